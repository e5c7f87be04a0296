"""Slices against a loop over users."""

import math

import pytest
import torch

from recsys_lightning.errors import InputError
from recsys_lightning.metrics import slices as slices_module
from recsys_lightning.metrics.ranking import ranking_metrics
from recsys_lightning.metrics.ranks import TargetRanks, rank_targets
from recsys_lightning.metrics.slices import SlicedMetrics, item_slices, user_slices

NUM_ITEMS, NUM_USERS = 20, 30


def items_of(mask: torch.Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


def test_item_slices_cut_the_items_by_how_often_training_met_them():
    counts = torch.tensor([0, 3, 9, 0, 3, 1, 8, 3, 0, 2, 1])  # 10 items; by count: 2 6 1 4 7 9 5 10 3 8
    slices = {name: items_of(mask) for name, mask in item_slices(counts, (0.3, 0.6)).items()}
    assert slices == {"head": [1, 2, 6], "mid": [4, 7, 9], "tail": [3, 4, 5, 7, 8, 9, 10], "cold-item": [3, 8]}


def test_padding_is_in_no_slice():
    assert not any(mask[0] for mask in item_slices(torch.zeros(11, dtype=torch.long)).values())


@pytest.mark.parametrize("cuts", [(0.0, 0.5), (0.5, 0.2), (0.2, 0.2), (0.2, 1.0), (0.2, math.nan), (0.2,)])
def test_senseless_cuts_are_refused(cuts):
    with pytest.raises(InputError, match="0 < first < second < 1"):
        item_slices(torch.ones(11), cuts)


def test_cold_users_have_at_most_so_many_interactions():
    assert user_slices(torch.tensor([5, 10, 11, 50]))["cold-user"].tolist() == [True, True, False, False]
    assert user_slices(torch.tensor([5, 10, 11, 50]), at_most=5)["cold-user"].tolist() == [True, False, False, False]


@pytest.fixture
def users() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lists of 8 of 20 items, their coarse scores, and up to 3 answers; every seventh user has none."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(NUM_ITEMS, generator=rng)[:8] + 1 for _ in range(NUM_USERS)])
    scores = torch.randint(0, 5, ids.shape, generator=rng).sort(1, descending=True).values.float()
    target = torch.randint(0, NUM_ITEMS + 1, (NUM_USERS, 3), generator=rng)
    return ids, scores, target * (torch.arange(NUM_USERS) % 7 != 0)[:, None]


@pytest.fixture
def masks() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(1)
    counts = torch.cat([torch.zeros(1, dtype=torch.long), torch.randint(0, 9, (NUM_ITEMS,), generator=rng)])
    lengths = torch.randint(5, 20, (NUM_USERS,), generator=rng)
    return item_slices(counts), user_slices(lengths)


def by_looping(users, masks) -> dict[str, float]:
    """Each slice by ranking each of its users alone, with only the answers in it."""
    items, people = masks
    everything = {"": torch.arange(NUM_ITEMS + 1) > 0}
    expected = {}
    for name in ("", *items, *people):
        sums, number = {}, 0
        for user, (ids, scores, target) in enumerate(zip(*users, strict=True)):
            mask = (everything | items).get(name, everything[""])
            answers = [answer if mask[answer] else 0 for answer in target.tolist()]
            if not any(answers) or (name in people and not people[name][user]):
                continue
            number += 1
            metrics = ranking_metrics((2, 5))
            metrics.update(rank_targets(ids[None], scores[None], torch.tensor([answers])))
            for metric, value in metrics.compute().items():
                sums[metric] = sums.get(metric, 0) + value.item()
        prefix = f"{name}/" if name else ""
        expected |= {f"{prefix}users": number} | {f"{prefix}{metric}": total / number for metric, total in sums.items()}
    return expected | {"users_without_answer": sum(not target.any() for target in users[2])}


@pytest.mark.parametrize("at_once", [1, 20, 10_000])
def test_slices_equal_a_loop_over_users(users, masks, at_once, monkeypatch):
    monkeypatch.setattr(slices_module, "ANSWERS_AT_ONCE", at_once)
    sliced = SlicedMetrics(ranking_metrics((2, 5)), *masks)
    for rows in torch.arange(NUM_USERS).split(4):
        ids, scores, target = (part[rows] for part in users)
        width = int((target != 0).any(0).nonzero().max()) + 1  # batches differ in the number of answers
        sliced.update(rank_targets(ids, scores, target[:, :width]), target[:, :width], rows)
    values = {name: value.item() for name, value in sliced.compute().items()}
    expected = by_looping(users, masks)
    assert values == pytest.approx(expected, abs=1e-12)
    assert {"users", "users_without_answer", "tail/recall@2", "cold-user/ndcg@5", "cold-item/users"} <= values.keys()
    assert values["users_without_answer"] > 0


def test_a_slice_without_users_reports_only_that(users, masks):
    nobody = {"nobody": torch.zeros(NUM_USERS, dtype=torch.bool)}
    sliced = SlicedMetrics(ranking_metrics((5,)), masks[0], nobody)
    ids, scores, target = users
    sliced.update(rank_targets(ids, scores, target), target, torch.arange(NUM_USERS))
    values = sliced.compute()
    assert [name for name in values if name.startswith("nobody/")] == ["nobody/users"]
    assert values["nobody/users"] == 0
    assert not any(value.isnan() for value in values.values())


def test_users_without_answers_are_counted_and_nothing_else_is_reported():
    sliced = SlicedMetrics(ranking_metrics((5,)))
    none = torch.zeros(3, 1, dtype=torch.long)
    sliced.update(TargetRanks(none, none, none.bool()), none, torch.arange(3))
    assert {name: value.item() for name, value in sliced.compute().items()} == {"users": 0, "users_without_answer": 3}


def test_reset_forgets_counted_and_waiting_users(users, masks, monkeypatch):
    ids, scores, target = users
    ranks = rank_targets(ids, scores, target)
    sliced = SlicedMetrics(ranking_metrics((5,)), *masks)
    sliced.update(ranks, target, torch.arange(NUM_USERS))
    first = sliced.compute()
    sliced.update(ranks, target, torch.arange(NUM_USERS))
    sliced.reset()
    sliced.update(ranks, target, torch.arange(NUM_USERS))
    assert sliced.compute() == first
    sliced.update(ranks, target, torch.arange(NUM_USERS))
    assert sliced.compute()["users"] == 2 * first["users"]


def test_wrong_shapes_and_shared_names_are_refused():
    sliced = SlicedMetrics(ranking_metrics((5,)))
    ones = torch.ones(4, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(4, 2\), \(4, 1\), \(4,\)"):
        sliced.update(TargetRanks(ones, ones, ones.bool()), ones[:, :1], torch.arange(4))
    with pytest.raises(ValueError, match="'new'"):
        SlicedMetrics(ranking_metrics((5,)), {"new": torch.ones(3).bool()}, {"new": torch.ones(4).bool()})
