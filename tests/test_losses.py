"""Each loss is the formula of its docstring, one term at a time."""

import math

import pytest
import torch

from recsys_lightning.losses import cross_entropy, info_nce


def info_nce_by_hand(query, candidates, target, temperature, excluded=None, log_q=None):
    def cosine(a, b):
        return float(torch.dot(a, b) / (a.norm() * b.norm()))

    total = 0.0
    for b, q in enumerate(query):
        weights = []
        for u, c in enumerate(candidates):
            if excluded is not None and excluded[b, u] and u != target[b]:
                weights.append(0.0)
                continue
            correction = 0.0 if log_q is None else float(log_q[u])
            weights.append(math.exp(cosine(q, c) / temperature - correction))
        total -= math.log(weights[int(target[b])] / sum(weights))
    return total / len(query)


@pytest.mark.parametrize("temperature", [0.0625, 0.2, 1.0])
@pytest.mark.parametrize("with_excluded", [False, True])
@pytest.mark.parametrize("with_log_q", [False, True])
def test_info_nce_is_equation_8(temperature, with_excluded, with_log_q):
    g = torch.Generator().manual_seed(0)
    query, candidates = torch.randn(5, 8, generator=g).double(), torch.randn(7, 8, generator=g).double()
    target = torch.tensor([0, 3, 6, 3, 2])
    excluded = torch.rand(5, 7, generator=g) < 0.4 if with_excluded else None
    log_q = torch.rand(7, generator=g).double().log() if with_log_q else None
    found = info_nce(query, candidates, target, temperature, excluded, log_q)
    assert float(found) == pytest.approx(
        info_nce_by_hand(query, candidates, target, temperature, excluded, log_q), rel=1e-5
    )


def test_a_perfect_pair_still_costs_what_the_temperature_leaves():
    """256 orthogonal negatives: without temperature the loss cannot fall below ln(1 + 256 / e)."""
    vectors = torch.eye(257)
    literal = info_nce(vectors[:1], vectors, torch.tensor([0]), temperature=1.0)
    sharp = info_nce(vectors[:1], vectors, torch.tensor([0]), temperature=0.1)
    assert float(literal) == pytest.approx(math.log(1 + 256 * math.exp(-1)), abs=1e-5)
    assert float(sharp) == pytest.approx(math.log(1 + 256 * math.exp(-10)), abs=1e-5)


def test_the_own_candidate_is_never_excluded():
    vectors = torch.eye(3)
    everything = torch.ones(3, 3, dtype=torch.bool)
    assert float(info_nce(vectors, vectors, torch.arange(3), 0.5, excluded=everything)) == pytest.approx(0.0, abs=1e-6)


def test_info_nce_sends_gradient_to_queries_and_candidates():
    query, candidates = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    info_nce(query, candidates, torch.tensor([0, 1, 2, 5]), 0.1).backward()
    assert (query.grad != 0).any(1).all()
    assert (candidates.grad != 0).any(1).all()


def test_cross_entropy_is_equation_7():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.5, 0.5]])
    by_hand = -(math.log(math.exp(2) / (math.exp(1) + math.exp(2) + 1)) + math.log(1 / 3)) / 2
    assert float(cross_entropy(logits, torch.tensor([1, 2]))) == pytest.approx(by_hand, rel=1e-6)


def test_no_rows_cost_nothing_rather_than_nan():
    assert float(cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))) == 0
    assert float(info_nce(torch.zeros(0, 2), torch.ones(3, 2), torch.zeros(0, dtype=torch.long), 1.0)) == 0
