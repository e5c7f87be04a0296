"""Balanced assignment against an exact solver of assignment problems."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from recsys_lightning.nn.balanced import balanced_assignment, balancing_prices


def costs_of(num_rows, num_codes, seed=0):
    return torch.rand(num_rows, num_codes, generator=torch.Generator().manual_seed(seed)) ** 2


def sizes(codes, num_codes):
    return torch.bincount(codes, minlength=num_codes)


def least_cost(costs, capacities):
    """What the best assignment costs in which code k has ``capacities[k]`` rows: so many columns each."""
    columns = np.repeat(costs.double().numpy(), capacities.tolist(), axis=1)
    rows, chosen = linear_sum_assignment(columns)
    return columns[rows, chosen].sum()


@pytest.mark.parametrize(("num_rows", "num_codes"), [(60, 6), (61, 6), (65, 6), (40, 20), (5, 8), (7, 7)])
@pytest.mark.parametrize("lean", [0.0, 3.0])
def test_no_balanced_assignment_costs_less(num_rows, num_codes, lean):
    costs = costs_of(num_rows, num_codes)
    costs[:, 0] -= lean  # with 3 every row would rather have code 0
    codes = balanced_assignment(costs).codes
    held = sizes(codes, num_codes)
    assert held.max() - held.min() <= 1
    assert held.sum() == num_rows
    found = float(costs.double().gather(1, codes[:, None]).sum())
    assert found == pytest.approx(least_cost(costs, held), abs=1e-5)


def test_each_row_has_the_code_of_its_least_cost_plus_price():
    costs = costs_of(90, 7)
    codes, prices = balanced_assignment(costs)
    paid = costs + prices
    torch.testing.assert_close(paid.gather(1, codes[:, None])[:, 0], paid.amin(1), atol=1e-6, rtol=0)


def test_prices_of_a_similar_problem_change_the_time_and_not_the_cost():
    costs = costs_of(60, 6)
    cold = balanced_assignment(costs)
    warm = balanced_assignment(costs, cold.prices + 0.05 * torch.randn(6, generator=torch.Generator().manual_seed(1)))
    total = [float(costs.gather(1, one.codes[:, None]).sum()) for one in (cold, warm)]
    assert total[0] == pytest.approx(total[1], abs=1e-5)


def test_rows_that_are_all_alike_are_dealt_out_evenly():
    codes = balanced_assignment(torch.ones(10, 4)).codes
    assert sorted(sizes(codes, 4).tolist()) == [2, 2, 3, 3]


def test_the_same_costs_give_the_same_answer():
    first, second = (balanced_assignment(costs_of(200, 9)) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.prices, second.prices)


def test_at_balancing_prices_the_cheapest_codes_are_nearly_balanced():
    costs = costs_of(3000, 6)
    costs[:, 0] -= 0.5
    held = sizes(costs.argmin(1), 6)
    assert held.max() > 2000
    held = sizes((costs + balancing_prices(costs)).argmin(1), 6)
    assert held.min() > 400
    assert held.max() < 600
