"""Each loss is the formula of its docstring, one term at a time."""

import math

import pytest
import torch

from recsys_lightning.losses import (
    bayesian_personalized_ranking,
    binary_cross_entropy,
    cross_entropy,
    info_nce,
    mixture_cross_entropy,
)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def info_nce_by_hand(query, candidates, target, temperature, excluded=None, log_q=None, similarity="cosine"):
    def alike(a, b):
        return float(torch.dot(a, b) / (a.norm() * b.norm() if similarity == "cosine" else 1))

    total = 0.0
    for b, q in enumerate(query):
        weights = []
        for u, c in enumerate(candidates):
            if excluded is not None and excluded[b, u] and u != target[b]:
                weights.append(0.0)
                continue
            correction = 0.0 if log_q is None else float(log_q[u])
            weights.append(math.exp(alike(q, c) / temperature - correction))
        total -= math.log(weights[int(target[b])] / sum(weights))
    return total / len(query)


@pytest.mark.parametrize("temperature", [0.0625, 0.2, 1.0])
@pytest.mark.parametrize("with_excluded", [False, True])
@pytest.mark.parametrize("with_log_q", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "inner_product"])
def test_info_nce_is_equation_8_by_cosines_and_by_inner_products(temperature, with_excluded, with_log_q, similarity):
    g = torch.Generator().manual_seed(0)
    query, candidates = torch.randn(5, 8, generator=g).double(), torch.randn(7, 8, generator=g).double()
    target = torch.tensor([0, 3, 6, 3, 2])
    excluded = torch.rand(5, 7, generator=g) < 0.4 if with_excluded else None
    log_q = torch.rand(7, generator=g).double().log() if with_log_q else None
    found = info_nce(query, candidates, target, temperature, excluded, log_q, similarity)
    by_hand = info_nce_by_hand(query, candidates, target, temperature, excluded, log_q, similarity)
    assert float(found) == pytest.approx(by_hand, rel=1e-5)


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


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_label_smoothing_gives_its_share_of_the_label_to_all_classes_alike(smoothing):
    logits, target = torch.tensor([[1.0, 2.0, 0.0], [0.5, -0.5, 3.0]]), [1, 0]
    terms = []
    for row, own in zip(logits.tolist(), target, strict=True):
        log_p = [x - math.log(sum(map(math.exp, row))) for x in row]
        terms.append(-(1 - smoothing) * log_p[own] - smoothing * sum(log_p) / 3)
    found = cross_entropy(logits, torch.tensor(target), smoothing)
    assert float(found) == pytest.approx(sum(terms) / 2, rel=1e-6)


def test_binary_cross_entropy_is_the_mean_over_rows_of_a_user_an_item_and_a_label():
    right, wrong = [[0.3], [-2.0]], [[1.0, -1.5, 0.0], [4.0, 0.2, -0.7]]
    rows = [(row[0], 1) for row in right] + [(score, 0) for row in wrong for score in row]
    terms = [y * math.log(sigmoid(s)) + (1 - y) * math.log(1 - sigmoid(s)) for s, y in rows]
    found = binary_cross_entropy(torch.tensor(right), torch.tensor(wrong))
    assert float(found) == pytest.approx(-sum(terms) / 8, rel=1e-6)


def test_binary_cross_entropy_of_extreme_scores_is_finite():
    scores = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    loss = binary_cross_entropy(scores, -scores)
    assert float(loss.detach()) == pytest.approx(100.0)  # two of four rows are wrong by 200
    loss.backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[0.0], [-0.5]]))


@pytest.mark.parametrize("valid", [None, [True, True, True], [True, False, True]])
def test_bayesian_personalized_ranking_is_the_mean_over_valid_rows_of_the_mean_over_their_pairs(valid):
    better, worse = [0.5, -1.0, 2.0], [[0.1, 0.9], [3.0, -4.0], [2.0, 1.0]]
    kept = [b for b in range(3) if valid is None or valid[b]]
    terms = [sum(-math.log(sigmoid(better[b] - score)) for score in worse[b]) / 2 for b in kept]
    found = bayesian_personalized_ranking(
        torch.tensor(better), torch.tensor(worse), None if valid is None else torch.tensor(valid)
    )
    assert float(found) == pytest.approx(sum(terms) / len(kept), rel=1e-6)


def test_a_row_that_is_not_valid_sends_no_gradient_even_where_its_scores_are_infinite():
    better, worse = torch.zeros(2, requires_grad=True), torch.tensor([[1.0], [torch.inf]], requires_grad=True)
    loss = bayesian_personalized_ranking(better, worse, torch.tensor([True, False]))
    assert float(loss.detach()) == pytest.approx(-math.log(sigmoid(-1.0)))
    loss.backward()
    torch.testing.assert_close(better.grad, torch.tensor([-sigmoid(1.0), 0.0]))
    torch.testing.assert_close(worse.grad, torch.tensor([[sigmoid(1.0)], [0.0]]))


@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_mixture_cross_entropy_is_that_of_the_weighted_sum_of_softmaxes(shift):
    """Weights are known up to a constant: those of the likeliest few of many codes need not sum to one."""
    g = torch.Generator().manual_seed(0)
    scores, log_weights, target = torch.randn(3, 2, 4, generator=g), torch.randn(3, 2, generator=g), [3, 0, 2]
    total = 0.0
    for b in range(3):
        weights = [math.exp(w) for w in log_weights[b].tolist()]
        chance = 0.0
        for weight, row in zip(weights, scores[b].tolist(), strict=True):
            chance += weight / sum(weights) * math.exp(row[target[b]]) / sum(map(math.exp, row))
        total -= math.log(chance)
    found = mixture_cross_entropy(scores, log_weights + shift, torch.tensor(target))
    assert float(found) == pytest.approx(total / 3, rel=1e-5)


def test_a_mixture_with_one_part_is_plain_cross_entropy():
    logits, target = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 0, 6, 2, 2])
    alone = mixture_cross_entropy(logits[:, None], torch.full((5, 1), -2.0), target)
    torch.testing.assert_close(alone, cross_entropy(logits, target))


def test_no_rows_cost_nothing_rather_than_nan():
    assert float(cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))) == 0
    assert float(info_nce(torch.zeros(0, 2), torch.ones(3, 2), torch.zeros(0, dtype=torch.long), 1.0)) == 0
    assert float(binary_cross_entropy(torch.zeros(0, 1), torch.zeros(0, 4))) == 0
    assert float(bayesian_personalized_ranking(torch.zeros(0), torch.zeros(0, 3))) == 0
    assert float(bayesian_personalized_ranking(torch.zeros(2), torch.zeros(2, 3), torch.zeros(2).bool())) == 0
    assert float(mixture_cross_entropy(torch.zeros(0, 2, 5), torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))) == 0
