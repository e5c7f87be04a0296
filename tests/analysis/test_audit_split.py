"""The audit's recount of splits, by hand and against the splitters; splitters that it does not know."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from recsys_lightning.analysis.audit_split import BOUNDS, check_split, recount
from recsys_lightning.data.interactions import Interactions
from recsys_lightning.data.splits import LeaveOneOut, Splitter, UserSplit

# ---------------------------------------------------------------------------------------------------- leave one out


def test_the_recount_is_leave_one_out_by_hand(small):
    counted = recount(small)
    for stage in ("val", "test"):
        assert counted.users(stage).tolist() == [1, 2, 3]
    assert counted.answers("val").tolist() == [3, 7, 12]
    assert counted.answers("test").tolist() == [4, 8, 13]
    assert counted.answers("val", "test").tolist() == counted.untrained(small).tolist() == [3, 4, 7, 8, 12, 13]
    assert counted.num_evaluated == 3
    assert counted.train_stop.tolist() == [2, 3, 7, 12]
    assert (counted.repeats, counted.ties, counted.disorder) == (1, 1, 0)


def test_the_recount_strikes_cold_items_from_training_and_from_nothing_else(small):
    counted, plainly = recount(small, cold=np.array([1, 6, 9])), recount(small)
    assert counted.cold.tolist() == [1, 6, 9]
    assert counted.closed.tolist() == [0, 1, 2, 3, 5], (
        "user 0 keeps item 2, user 1 item 3, user 2 item 7, user 3 2 and 3"
    )
    assert plainly.closed.tolist() == [0, 2, 3, 5, 8]
    assert np.array_equal(counted.bounds, plainly.bounds)
    assert (counted.repeats, plainly.repeats) == (0, 1), "item 6, which user 2 meets again, is in no training"


@pytest.mark.parametrize(
    ("items", "repeats"), [([1, 2, 1, 3], 1), ([1, 2, 3, 2], 1), ([1, 2, 3, 3], 0), ([1, 1, 2, 3], 0)]
)
def test_a_user_repeats_where_either_held_out_item_is_among_his_training_items(items, repeats):
    assert recount(Interactions(np.array([0, 4]), np.array(items), np.arange(4), 3)).repeats == repeats


@pytest.mark.parametrize("times", [[3, 2, 4], [1, 5, 4], [1, 2, 1]])
def test_the_recount_finds_a_held_out_answer_that_is_older_than_training(times):
    # Interactions refuse such times at birth; the recount does not rely on it.
    columns = {"offsets": np.array([0, 3]), "items": np.array([1, 2, 3]), "timestamps": np.array(times)}
    assert recount(SimpleNamespace(num_users=1, **columns)).disorder == 1


# ------------------------------------------------------------------------------------------------------- user split


def many(lengths: list[int]) -> Interactions:
    total = sum(lengths)
    items = np.random.default_rng(0).integers(1, 9, total)
    return Interactions(np.cumsum([0, *lengths]), items, np.arange(total), 8)


def test_the_recount_of_a_user_split_by_hand():
    interactions = many([1, 5, 5, 5, 5])
    counted = recount(interactions, UserSplit(0.25, 0.25, history=0.5))
    (val,), (test,) = counted.users("val"), counted.users("test")
    assert len({0, val, test}) == 3
    first = interactions.offsets[:-1]
    assert counted.answers("val").tolist() == [first[val] + place for place in (2, 3, 4)]
    assert counted.answers("test").tolist() == [first[test] + place for place in (2, 3, 4)]
    held_out = [first[user] + place for user in (val, test) for place in range(5)]
    assert counted.untrained(interactions).tolist() == sorted(held_out), "their histories, too"
    assert (
        counted.closed.tolist()
        == np.cumsum([0, *(0 if user in (val, test) else n for user, n in enumerate([1, *[5] * 4]))]).tolist()
    )


@pytest.mark.parametrize(
    "splitter", [LeaveOneOut(), UserSplit(), UserSplit(0.31, 0.17, 0.29, seed=4), UserSplit(history=0.999)]
)
def test_the_recount_and_the_splitters_agree_on_many_users(splitter):
    interactions = many(np.random.default_rng(1).integers(1, 40, 300).tolist())
    counted, split = recount(interactions, splitter), splitter(interactions)
    for name, bound in zip(BOUNDS, counted.bounds, strict=True):
        assert bound.tolist() == getattr(split, name).tolist()
    check = check_split(interactions, counted, split, {})
    assert check.status == "pass"
    assert check.figures["users"] == 300


def test_a_repeat_of_a_held_out_user_is_one_of_his_answers_among_his_history():
    for items, repeats in (([1, 2, 3, 4, 5], 0), ([1, 2, 3, 4, 4], 0), ([1, 2, 1, 4, 5], 10), ([1, 2, 3, 4, 2], 10)):
        lengths = [5] * 20
        interactions = Interactions(np.cumsum([0, *lengths]), np.array(items * 20), np.arange(100), 5)
        counted = recount(interactions, UserSplit(0.25, 0.25, history=0.4))
        assert (counted.repeats, counted.ties, counted.disorder) == (repeats, 0, 0)


def test_other_users_than_the_seed_draws_are_found():
    interactions = many([5] * 40)
    counted = recount(interactions, UserSplit(seed=1))
    check = check_split(interactions, counted, UserSplit(seed=2)(interactions), {})
    assert check.status == "FAIL"
    assert "train_stop of" in check.detail


# ------------------------------------------------------------------------------------------------- other splitters


@dataclass(frozen=True)
class LastTwo(Splitter):
    """The last two items of every user are his test answers; with `overlap` he trains on the first of them."""

    overlap: int = 0

    def __call__(self, interactions):
        stop = interactions.offsets[1:]
        return replace(
            LeaveOneOut()(interactions),
            train_stop=stop - 2 + self.overlap,
            val_start=stop - 2,
            val_stop=stop - 2,
            test_start=stop - 2,
        )


def test_a_splitter_that_no_recount_knows_is_not_judged_but_its_answers_are_known():
    interactions = many([3, 4, 5])
    counted = recount(interactions, LastTwo())
    assert counted.answers("test").tolist() == counted.untrained(interactions).tolist() == [1, 2, 5, 6, 10, 11]
    check = check_split(interactions, counted, LastTwo()(interactions), {})
    assert (check.status, check.detail) == (
        "not checked",
        "no training reaches an answer, but no recount knows which answers LastTwo should hold out",
    )


def test_a_class_derived_from_a_known_splitter_is_not_taken_for_it():
    class Lenient(LeaveOneOut):
        def __call__(self, interactions):
            return LastTwo()(interactions)

    interactions = many([3, 4, 5])
    assert (
        check_split(interactions, recount(interactions, Lenient()), Lenient()(interactions), {}).status == "not checked"
    )


def test_an_unknown_splitter_by_which_training_reaches_an_answer_fails():
    interactions = many([3, 4, 5])
    splitter = LastTwo(overlap=1)
    check = check_split(interactions, recount(interactions, splitter), splitter(interactions), {})
    assert (check.status, check.detail) == ("FAIL", "the bounds of 3 users overlap, or belong to another user")
