"""Semantic-ID scores against tuple-level counting, one user at a time."""

import math
import random

import pytest
import torch

from recsys_lightning.errors import InputError
from recsys_lightning.metrics.ranking import NDCGAtK, RecallAtK
from recsys_lightning.metrics.ranks import rank_targets
from recsys_lightning.metrics.semantic_ids import SemanticIdMetrics

CODES = {1: (0, 0), 2: (0, 0), 3: (0, 1), 4: (1, 0), 5: (1, 0), 6: (1, 1), 7: (2, 0)}  # tuple of each item
LEAVES = {codes: leaf for leaf, codes in enumerate(sorted(set(CODES.values())))}
LEAF_OF_ITEM = torch.tensor([-1, *(LEAVES[CODES[item]] for item in range(1, 8))])
NOBODYS = (9, 9)


def tuple_level(generated: list[tuple[int, int]], answers: list[int], k: int) -> tuple[float, float]:
    """Recall and NDCG of generated tuples, as public evaluators count them."""
    wanted = {CODES[answer] for answer in answers if answer}
    ranks = [generated.index(codes) + 1 for codes in wanted if codes in generated[:k]]
    best = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(wanted)) + 1))
    return len(ranks) / len(wanted), sum(1 / math.log2(rank + 1) for rank in ranks) / best


def batch_of(generated: list[list[tuple[int, int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    leaves = torch.tensor([[LEAVES.get(codes, -1) for codes in row] for row in generated])
    return leaves, -torch.arange(1.0, leaves.shape[1] + 1).expand_as(leaves)


def test_300_random_users_equal_tuple_level_counting():
    rng = random.Random(0)
    ks = (1, 3, 9)
    metric = SemanticIdMetrics(ks, LEAF_OF_ITEM)
    generated = [[rng.choice([*LEAVES, NOBODYS]) for _ in range(4)] for _ in range(300)]
    answers = [[rng.randint(0, 7) for _ in range(3)] for _ in range(300)]
    lists = torch.tensor([rng.sample(range(1, 8), 5) for _ in range(300)])
    ranks = rank_targets(lists, -torch.arange(5.0).expand(300, 5), torch.tensor(answers))
    leaves, log_probs = batch_of(generated)
    for rows in torch.arange(300).split(64):
        part = type(ranks)(*(field[rows] for field in ranks))
        metric.update(leaves[rows], log_probs[rows], torch.tensor(answers)[rows], part)
    values = {name: value.item() for name, value in metric.compute().items()}
    users = [pair for pair in zip(generated, answers, strict=True) if any(pair[1])]
    expected = {"semantic-id/invalid": sum(row.count(NOBODYS) for row in generated) / 1200}
    for k in ks:
        recall, ndcg = (sum(column) / len(users) for column in zip(*(tuple_level(*u, k) for u in users), strict=True))
        expected[f"semantic-id/recall@{k}"], expected[f"semantic-id/ndcg@{k}"] = recall, ndcg
        expected[f"semantic-id/inflation@{k}"] = recall / RecallAtK(k).values(ranks).nanmean().item()
    assert values == pytest.approx(expected, abs=1e-12)


def test_collisions_inflate_recall():
    """Both users' answers share their tuple with another item; the tuple is found, the item only by one of them."""
    metric = SemanticIdMetrics((1,), LEAF_OF_ITEM)
    target = torch.tensor([[2], [5]])
    item_ranks = rank_targets(torch.tensor([[1], [5]]), torch.zeros(2, 1), target)
    metric.update(*batch_of([[(0, 0)], [(1, 0)]]), target, item_ranks)
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == {
        "semantic-id/recall@1": 1,
        "semantic-id/ndcg@1": 1,
        "semantic-id/inflation@1": 2,
        "semantic-id/invalid": 0,
    }


def test_answers_that_share_a_semantic_id_count_once():
    metric = SemanticIdMetrics((2,), LEAF_OF_ITEM)
    target = torch.tensor([[1, 2, 3]])  # two semantic IDs
    item_ranks = rank_targets(torch.tensor([[1, 2]]), torch.tensor([[1.0, 0.0]]), target)
    metric.update(*batch_of([[(0, 0), (2, 0)]]), target, item_ranks)
    values = metric.compute()
    assert values["semantic-id/recall@2"] == 1 / 2
    assert values["semantic-id/inflation@2"].item() == pytest.approx((1 / 2) / (2 / 3))


def test_tied_beams_are_ranked_by_expected_value_those_of_nobody_included():
    metric = SemanticIdMetrics((1, 2), LEAF_OF_ITEM)
    target = torch.tensor([[7]])
    leaves, _ = batch_of([[(0, 0), (2, 0), NOBODYS, NOBODYS]])
    item_ranks = rank_targets(torch.tensor([[7]]), torch.zeros(1, 1), target)
    metric.update(leaves, torch.zeros(1, 4), target, item_ranks)
    assert metric.compute()["semantic-id/recall@1"] == 1 / 4
    assert metric.compute()["semantic-id/recall@2"] == 2 / 4
    assert metric.compute()["semantic-id/invalid"] == 2 / 4


def test_beams_that_were_never_generated_are_neither_hits_nor_invalid():
    metric = SemanticIdMetrics((5,), LEAF_OF_ITEM)
    target = torch.tensor([[7]])
    leaves, _ = batch_of([[NOBODYS, (1, 1), (2, 0), NOBODYS]])
    log_probs = torch.tensor([[-1.0, -2.0, -torch.inf, -torch.inf]])
    metric.update(leaves, log_probs, target, rank_targets(torch.tensor([[7]]), torch.zeros(1, 1), target))
    assert metric.compute()["semantic-id/recall@5"] == 0
    assert metric.compute()["semantic-id/invalid"] == 1 / 2


def test_only_answers_that_count_for_items_count_here():
    metric = SemanticIdMetrics((3,), LEAF_OF_ITEM)
    target = torch.tensor([[1, 7], [3, 0]])
    ranks = rank_targets(torch.tensor([[7, 1], [6, 5]]), torch.zeros(2, 2), target)
    metric.update(*batch_of([[(2, 0)], [(0, 1)]]), target, ranks.only(torch.tensor([[True, False], [False, False]])))
    assert metric.num_users == 1
    assert metric.compute()["semantic-id/recall@3"] == 0


def test_where_no_item_was_found_or_no_user_counts_the_ratio_is_left_out():
    metric = SemanticIdMetrics((1,), LEAF_OF_ITEM)
    for target in (torch.tensor([[0]]), torch.tensor([[2]])):
        ranks = rank_targets(torch.tensor([[3]]), torch.zeros(1, 1), target)
        metric.update(*batch_of([[(0, 0)]]), target, ranks)
        names = set(metric.compute())
        scored = {"semantic-id/recall@1", "semantic-id/ndcg@1"} if target.any() else set()
        assert names == {"semantic-id/invalid"} | scored


def test_without_collisions_semantic_ids_score_as_items_do():
    rng = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (50, 9), generator=rng).sort(1, descending=True).values.float()
    lists = torch.stack([torch.randperm(9, generator=rng) for _ in range(50)]) + 1
    target = torch.randint(0, 10, (50, 2), generator=rng)
    ranks = rank_targets(lists, scores, target)
    metric = SemanticIdMetrics((4,), torch.arange(10) - 1)
    metric.update(lists - 1, scores, target, ranks)
    values = metric.compute()
    assert values["semantic-id/recall@4"].item() == pytest.approx(RecallAtK(4).values(ranks).nanmean().item())
    assert values["semantic-id/ndcg@4"].item() == pytest.approx(NDCGAtK(4).values(ranks).nanmean().item())
    assert values["semantic-id/inflation@4"].item() == pytest.approx(1)


def test_two_halves_merge_to_the_whole():
    rng = torch.Generator().manual_seed(0)
    leaves = torch.stack([torch.randperm(5, generator=rng) for _ in range(20)])
    target = torch.randint(0, 8, (20, 2), generator=rng)
    lists = torch.stack([torch.randperm(7, generator=rng) for _ in range(20)]) + 1
    metrics = [SemanticIdMetrics((1, 3), LEAF_OF_ITEM) for _ in range(3)]
    for metric, rows in zip(metrics, (slice(0, 20), slice(0, 6), slice(6, 20)), strict=True):
        ranks = rank_targets(lists[rows], torch.zeros_like(lists[rows]).float(), target[rows])
        metric.update(leaves[rows], torch.zeros_like(leaves[rows]).float(), target[rows], ranks)
    whole, first, second = metrics
    first.merge_state(second)
    merged = {name: value.item() for name, value in first.compute().items()}
    assert merged == pytest.approx({name: value.item() for name, value in whole.compute().items()}, abs=1e-12)


def test_bad_input_is_refused():
    target = torch.tensor([[7]])
    ranks = rank_targets(torch.tensor([[7]]), torch.zeros(1, 1), target)
    metric = SemanticIdMetrics((1,), LEAF_OF_ITEM)
    with pytest.raises(InputError, match="row 0 of the batch hold NaN"):
        metric.update(torch.tensor([[0, 1]]), torch.tensor([[0.0, torch.nan]]), target, ranks)
    with pytest.raises(ValueError, match=r"\(1, 2\), \(1, 1\)"):
        metric.update(torch.tensor([[0]]), torch.zeros(1, 1), torch.tensor([[7, 0]]), ranks)
    for leaves in ([0, 0, 1], [-1, 0, -1]):
        with pytest.raises(ValueError, match="leaf_of_item"):
            SemanticIdMetrics((1,), torch.tensor(leaves))
