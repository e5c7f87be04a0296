"""Sinkhorn-balanced assignment against the textbook's loop, its marginals and the best balanced assignment."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys_lightning.errors import InputError
from recsys_lightning.nn.sinkhorn import balanced_codes, sinkhorn_plan


def random_distances(num_rows: int = 12, num_codes: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows, codes = torch.randn(num_rows, 3, generator=generator), torch.randn(num_codes, 3, generator=generator)
    return torch.cdist(rows, codes).square()


def plan_by_loop(distances: Tensor, epsilon: float, iterations: int) -> np.ndarray:
    """Scale rows to 1 / B and columns to 1 / K in turns, at last rows to 1, in extended precision."""
    costs = distances.double().numpy().astype(np.longdouble)
    middle = (costs.max() + costs.min()) / 2
    plan = np.exp(-(costs - middle) / (costs.max() - middle) / epsilon)
    num_rows, num_codes = plan.shape
    for _ in range(iterations):
        for b in range(num_rows):
            plan[b] = plan[b] / plan[b].sum() / num_rows
        for k in range(num_codes):
            plan[:, k] = plan[:, k] / plan[:, k].sum() / num_codes
    return plan / plan.sum(1, keepdims=True)


@pytest.mark.parametrize("epsilon", [0.003, 0.05, 1.0])
@pytest.mark.parametrize("iterations", [1, 7])
def test_the_plan_is_that_of_a_loop_over_rows_and_columns(epsilon, iterations):
    distances = random_distances()
    expected = plan_by_loop(distances, epsilon, iterations).astype(np.float64)
    np.testing.assert_allclose(sinkhorn_plan(distances, epsilon, iterations).numpy(), expected, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("shape", [(12, 4), (4, 12), (7, 3)])
def test_each_row_is_given_out_once_and_every_code_gets_its_fair_share(shape):
    plan = sinkhorn_plan(random_distances(*shape), 0.05, iterations=500)
    torch.testing.assert_close(plan.sum(1), torch.ones(shape[0], dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((shape[1],), shape[0] / shape[1], dtype=torch.float64))


def test_at_a_small_epsilon_it_is_the_balanced_assignment_of_least_total_distance():
    distances = random_distances(6, 3)
    ways = [way for way in itertools.product(range(3), repeat=6) if all(way.count(k) == 2 for k in range(3))]
    best = min(ways, key=lambda way: float(distances[torch.arange(6), torch.tensor(way)].sum()))
    assert balanced_codes(distances, iterations=2000).tolist() == list(best)
    assert list(best) != distances.argmin(1).tolist()  # the nearest codes are not balanced here


def test_a_large_epsilon_forgets_the_distances():
    torch.testing.assert_close(
        sinkhorn_plan(random_distances(), 1e4), torch.full((12, 4), 0.25, dtype=torch.float64), atol=1e-3, rtol=0
    )


def test_scale_and_offset_of_the_distances_change_nothing():
    distances = random_distances().double()
    torch.testing.assert_close(sinkhorn_plan(1e-6 * distances + 3e-7), sinkhorn_plan(distances))


@pytest.mark.parametrize(
    "distances",
    [
        torch.zeros(5, 3),
        torch.eye(4)[:, [0, 0, 0, 1]] * 1e30,
        torch.cat([torch.zeros(50, 1), torch.ones(50, 7)], 1),
        torch.tensor([[1.0]]),
    ],
    ids=["all equal", "huge", "all want one code", "one row, one code"],
)
def test_nothing_is_lost_at_the_smallest_epsilon(distances):
    plan = sinkhorn_plan(distances, 0.003, 300)
    assert torch.isfinite(plan).all()
    torch.testing.assert_close(plan.sum(1), torch.ones(len(distances), dtype=torch.float64))


def test_equal_rows_get_equal_codes():
    distances = random_distances(8, 4)
    codes = balanced_codes(torch.cat([distances, distances]))
    assert torch.equal(codes[:8], codes[8:])


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.001, 10), (float("inf"), 10), (float("nan"), 10), (0.01, 0)])
def test_what_cannot_be_computed_is_refused(epsilon, iterations):
    with pytest.raises(InputError, match=r"Sinkhorn assignment .* got"):
        sinkhorn_plan(random_distances(), epsilon, iterations)
