"""Ranking metrics against the formulas, one user at a time."""

import math
import random

import pytest
import torch
from torchmetrics.retrieval import RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

from recsys_lightning.errors import InputError
from recsys_lightning.metrics.ranking import MRRAtK, NDCGAtK, RecallAtK, count_relevant, hits, ranking_metrics

KS = (1, 3, 5, 20)


def by_hand(recommended: list[int], relevant: list[int], k: int) -> dict[str, float] | None:
    """The definitions, for one user; None for a user without a relevant item."""
    wanted = {item for item in relevant if item != 0}
    if not wanted:
        return None
    found, dcg, mrr = set(), 0.0, 0.0
    for rank, item in enumerate(recommended[:k], start=1):
        if item in wanted and item not in found:
            found.add(item)
            dcg += 1 / math.log2(rank + 1)
            mrr = mrr or 1 / rank
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(wanted)) + 1))
    return {"recall": len(found) / len(wanted), "ndcg": dcg / ideal, "mrr": mrr}


def random_case(rng: random.Random) -> tuple[list[list[int]], list[list[int]]]:
    """Up to 4 users over a dozen items: padding anywhere, repeats, several relevant items, lists shorter than k."""
    users, places, wanted = rng.randint(1, 4), rng.randint(1, 10), rng.randint(1, 8)
    draw = lambda count: [rng.randint(0, 12) for _ in range(count)]  # noqa: E731
    relevant = [draw(wanted) if rng.random() < 0.8 else [0] * wanted for _ in range(users)]
    return [draw(places) for _ in range(users)], relevant


def test_1000_random_cases_equal_the_formulas_by_hand():
    rng = random.Random(0)
    for _ in range(1000):
        recommended, relevant = random_case(rng)
        found = hits(torch.tensor(recommended), torch.tensor(relevant))
        counts = count_relevant(torch.tensor(relevant))
        k = rng.choice(KS)
        users = [by_hand(*lists, k) for lists in zip(recommended, relevant, strict=True)]
        scored = [user for user in users if user is not None]
        for name, kind in {"recall": RecallAtK, "ndcg": NDCGAtK, "mrr": MRRAtK}.items():
            metric = kind(k)
            metric.update(found, counts)
            value = metric.compute().item()
            assert int(metric.num_users) == len(scored)
            if scored:
                assert value == pytest.approx(sum(user[name] for user in scored) / len(scored), abs=1e-12)
                assert 0 <= value <= 1
            else:
                assert math.isnan(value)


def test_hits_are_exact_ids_padding_never_hits_and_repeats_count_at_their_first_place():
    recommended = torch.tensor([[5, 0, 7, 5, 7], [0, 0, 2, 1, 2]])
    relevant = torch.tensor([[7, 5, 5], [2, 0, 0]])
    expected = [[True, False, True, False, False], [False, False, True, False, False]]
    assert hits(recommended, relevant).tolist() == expected
    assert count_relevant(relevant).tolist() == [2, 1]


def test_one_relevant_item_gives_the_usual_leave_one_out_values():
    metrics = ranking_metrics((2, 5))
    found = hits(torch.tensor([[9, 4, 3], [9, 8, 4]]), torch.tensor([[4], [4]]))
    metrics.update(found, torch.tensor([1, 1]))
    values = {name: value.item() for name, value in metrics.compute().items()}
    assert values == pytest.approx(
        {
            "recall@2": 1 / 2,
            "ndcg@2": (1 / math.log2(3)) / 2,
            "mrr@2": (1 / 2) / 2,
            "recall@5": 1,
            "ndcg@5": (1 / math.log2(3) + 1 / 2) / 2,
            "mrr@5": (1 / 2 + 1 / 3) / 2,
        },
        abs=1e-12,
    )


def test_a_perfect_list_scores_one_even_with_more_relevant_items_than_k():
    found, counts = torch.ones(1, 3, dtype=torch.bool), torch.tensor([7])
    metric = NDCGAtK(3)
    metric.update(found, counts)
    assert metric.compute().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_torchmetrics_retrieval_agrees(k):
    rng = torch.Generator().manual_seed(k)
    users, items = 40, 30
    scores = torch.rand(users, items, generator=rng)
    labels = torch.rand(users, items, generator=rng) < 0.15
    labels[:, 0] |= ~labels.any(1)  # torchmetrics has rules of its own for users without a relevant item
    users_of = torch.arange(users)[:, None].expand(users, items)
    found = labels.gather(1, scores.argsort(1, descending=True))
    ours = {kind: kind(k) for kind in (RecallAtK, NDCGAtK, MRRAtK)}
    theirs = {
        RecallAtK: RetrievalRecall(top_k=k),
        NDCGAtK: RetrievalNormalizedDCG(top_k=k),
        MRRAtK: RetrievalMRR(top_k=k),
    }
    for kind, metric in ours.items():
        metric.update(found, labels.sum(1))
        theirs[kind].update(scores.flatten(), labels.flatten(), indexes=users_of.flatten())
        assert metric.compute().item() == pytest.approx(theirs[kind].compute().item(), abs=1e-6)


def some_users(count: int = 21) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    recommended = torch.stack([torch.randperm(30, generator=rng)[:12] + 1 for _ in range(count)])
    relevant = torch.randint(0, 31, (count, 4), generator=rng) * (torch.arange(count) % 5 != 0)[:, None]
    return hits(recommended, relevant), count_relevant(relevant)


@pytest.mark.parametrize("size", [1, 4, 7, 21])
def test_the_size_of_the_batches_does_not_matter(size):
    found, counts = some_users()
    whole, parts = ranking_metrics(KS), ranking_metrics(KS)
    whole.update(found, counts)
    for batch in zip(found.split(size), counts.split(size), strict=True):
        parts.update(*batch)
    for name, value in whole.compute().items():
        assert parts.compute()[name].item() == pytest.approx(value.item(), abs=1e-12)


@pytest.mark.parametrize("split", [0, 1, 10])
def test_two_ranks_merge_by_summing_their_states(split):
    found, counts = some_users()
    for kind in (RecallAtK, NDCGAtK, MRRAtK):
        whole, first, second = kind(5), kind(5), kind(5)
        whole.update(found, counts)
        first.update(found[:split], counts[:split])  # with split 0 this rank has no user
        second.update(found[split:], counts[split:])
        total, users = first.total + second.total, first.num_users + second.num_users
        assert (total / users).item() == pytest.approx(whole.compute().item(), abs=1e-12)
        first.merge_state(second)
        assert first.compute().item() == pytest.approx(whole.compute().item(), abs=1e-12)


def test_metrics_that_agree_on_the_first_batch_stay_apart():
    """torchmetrics would otherwise join recall@1 and recall@2, which are both 0 on the first batch."""
    metrics = ranking_metrics((1, 2))
    one = torch.ones(1, dtype=torch.long)
    metrics.update(torch.tensor([[False, False]]), one)
    metrics.update(torch.tensor([[False, True]]), one)
    values = {name: value.item() for name, value in metrics.compute().items()}
    assert (values["recall@1"], values["recall@2"], values["mrr@2"]) == (0, 0.5, 0.25)


def test_names_are_metric_at_k_and_the_default_ks_are_those_of_the_papers():
    names = {f"{name}@{k}" for k in (5, 10, 20, 50) for name in ("recall", "ndcg", "mrr")}
    assert set(ranking_metrics().keys()) == names


def test_sums_are_float64_whatever_the_default_type():
    metric = RecallAtK(5)
    metric.update(*some_users())
    assert metric.total.dtype == metric.compute().dtype == torch.float64


@pytest.mark.parametrize("ks", [(), (5, 5), (0, 5)])
def test_senseless_ks_are_refused(ks):
    with pytest.raises(InputError, match="different ks of at least 1"):
        ranking_metrics(ks)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4,\)"):
        hits(torch.ones(4, 3, dtype=torch.long), torch.ones(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(3,\)"):
        RecallAtK(2).update(torch.ones(4, 3, dtype=torch.bool), torch.ones(3, dtype=torch.long))
