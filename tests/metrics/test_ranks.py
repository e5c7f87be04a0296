"""Ranks of answers against a walk along each list."""

import random

import numpy as np
import pytest
import torch

from recsys_lightning.errors import InputError
from recsys_lightning.metrics import ranks as ranks_module
from recsys_lightning.metrics.ranks import TargetRanks, rank_targets, repeats


def by_walking(ids: list[int], scores: list[float], target: list[int]) -> list[tuple[int, int, bool]]:
    """(first, tied, relevant) of each answer of one user, from the definitions."""
    end = max((place for place, item in enumerate(ids, start=1) if item), default=0)
    answers = []
    for number, answer in enumerate(target):
        first = tied = 0
        if answer and answer in ids:
            score = scores[ids.index(answer)]
            first = 1 + sum(other > score for other in scores)
            tied = sum(other == score for other in scores[:end])
        answers.append((first, tied, bool(answer) and answer not in target[:number]))
    return answers


def random_lists(rng: random.Random) -> tuple[list[list[int]], list[list[float]], list[list[int]]]:
    """Up to 4 users: ties, repeated items, lists that end early, repeated answers, users without any."""
    users, places, answers = rng.randint(1, 4), rng.randint(1, 9), rng.randint(1, 5)
    ids, scores, target = [], [], []
    for _ in range(users):
        length = rng.randint(0, places)
        ids.append([rng.randint(1, 10) for _ in range(length)] + [0] * (places - length))
        levels = rng.choice([[1.0], [0.5, 1.0], [0.1 * n for n in range(30)], [-float("inf"), 2.0]])
        scores.append(sorted(rng.choices(levels, k=length), reverse=True) + [-float("inf")] * (places - length))
        target.append([rng.randint(0, 10) for _ in range(answers)])
    return ids, scores, target


def test_1000_random_cases_equal_a_walk_along_the_lists():
    rng = random.Random(0)
    for _ in range(1000):
        case = random_lists(rng)
        ids, scores, target = map(torch.tensor, case)
        first, tied, relevant = rank_targets(ids, scores, target)
        expected = [by_walking(*user) for user in zip(*case, strict=True)]
        found = torch.stack([first, tied, relevant.long()], -1).tolist()
        assert found == [[list(map(int, answer)) for answer in user] for user in expected]


def test_ties_are_runs_of_equal_scores_and_the_end_of_a_list_is_none():
    ids = torch.tensor([[5, 7, 2, 9, 0, 0]])
    scores = torch.tensor([[3.0, 1.0, 1.0, -torch.inf, -torch.inf, -torch.inf]])
    ranks = rank_targets(ids, scores, torch.tensor([[2, 5, 9, 4, 0]]))
    assert ranks.first.tolist() == [[2, 1, 4, 0, 0]]
    assert ranks.tied.tolist() == [[2, 1, 1, 0, 0]]
    assert ranks.relevant.tolist() == [[True, True, True, True, False]]


def test_an_item_counts_at_its_first_place_and_its_later_places_take_up_room():
    ids, scores = torch.tensor([[7, 7, 3, 7]]), torch.tensor([[2.0, 2.0, 2.0, 1.0]])
    ranks = rank_targets(ids, scores, torch.tensor([[7, 3, 7]]))
    assert ranks.first.tolist() == [[1, 1, 1]]
    assert ranks.tied.tolist() == [[3, 3, 3]]
    assert ranks.relevant.tolist() == [[True, True, False]]


def test_many_answers_and_long_lists_are_compared_in_parts_with_one_result(monkeypatch):
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(np.stack([rng.permutation(500)[:300] + 1 for _ in range(7)]))
    scores = torch.from_numpy(np.sort(rng.integers(0, 40, (7, 300)))[:, ::-1].astype(np.float32).copy())
    target = torch.from_numpy(rng.integers(0, 500, (7, 90)))
    whole = rank_targets(ids, scores, target)
    sizes = []
    real = torch.Tensor.argmax
    monkeypatch.setattr(torch.Tensor, "argmax", lambda self, *args: sizes.append(self.numel()) or real(self, *args))
    monkeypatch.setattr(ranks_module, "COMPARISONS_AT_ONCE", 20_000)
    parts = rank_targets(ids, scores, target)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    assert max(sizes) <= 20_000
    assert len(sizes) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_of_every_precision_rank_alike(dtype):
    scores = torch.tensor([[2.0, 1.0, 1.0, -3.0]], dtype=dtype)
    ranks = rank_targets(torch.tensor([[4, 2, 3, 1]]), scores, torch.tensor([[3, 1]]))
    assert (ranks.first.tolist(), ranks.tied.tolist()) == ([[2, 4]], [[2, 1]])


def test_lists_without_places_and_batches_without_users_are_fine():
    nothing = rank_targets(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0), torch.tensor([[3], [0]]))
    assert nothing.first.tolist() == [[0], [0]]
    assert nothing.relevant.tolist() == [[True], [False]]
    empty = rank_targets(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.long))
    assert empty.first.shape == (0, 2)


def test_nan_is_refused_with_its_row():
    for place in (0, 2):
        scores = torch.tensor([[3.0, 2.0, 1.0]] * 4)
        scores[2, place] = torch.nan
        with pytest.raises(InputError, match=r"row 2 of the batch hold NaN \(1 of 4 rows do\)"):
            rank_targets(torch.arange(1, 4).expand(4, 3), scores, torch.ones(4, 1, dtype=torch.long))
    with pytest.raises(InputError, match="row 0"):
        rank_targets(torch.tensor([[1]]), torch.tensor([[torch.nan]]), torch.tensor([[1]]))


def test_scores_that_increase_are_refused_with_their_row():
    with pytest.raises(ValueError, match="row 1"):
        rank_targets(
            torch.ones(2, 2, dtype=torch.long), torch.tensor([[1.0, 1.0], [1.0, 2.0]]), torch.tensor([[1], [1]])
        )


@pytest.mark.parametrize("shapes", [((4, 3), (4, 2), (4, 1)), ((4, 3), (4, 3), (3, 1)), ((4, 3), (4, 3), (4,))])
def test_wrong_shapes_are_named(shapes):
    ids, scores, target = (torch.ones(shape, dtype=torch.long) for shape in shapes)
    with pytest.raises(ValueError, match=str(list(shapes)).replace("(", r"\(").replace(")", r"\)").strip("[]")):
        rank_targets(ids, scores.float(), target)


def test_only_keeps_the_answers_of_a_slice_and_where_they_stand():
    ranks = TargetRanks(torch.tensor([[1, 0, 1]]), torch.tensor([[2, 0, 2]]), torch.tensor([[True, True, False]]))
    only = ranks.only(torch.tensor([[False, True, True]]))
    assert only.relevant.tolist() == [[False, True, False]]
    assert torch.equal(only.first, ranks.first)
    with pytest.raises(ValueError, match=r"\(1, 3\), one value an answer, got \(1, 1\)"):
        ranks.only(torch.tensor([[True]]))


def test_repeats_are_the_later_places_of_an_id():
    ids = torch.tensor([[5, 0, 7, 5, 7, 5], [1, 2, 3, 4, 5, 6]])
    assert repeats(ids).tolist() == [[False, False, False, True, True, True], [False] * 6]
