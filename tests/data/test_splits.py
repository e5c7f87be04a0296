"""Splits: leave-one-out and the user split by hand, what is trained on, cold items."""

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest

from recsys_lightning.data.interactions import Interactions
from recsys_lightning.data.splits import LeaveOneOut, Split, UserSplit, draw_cold, training_part
from recsys_lightning.errors import InputError


def interactions_of(lengths: list[int], items: list[int] | None = None, num_items: int = 1) -> Interactions:
    """Users of so many interactions, with item 1 unless told."""
    total = sum(lengths)
    found = np.array([1] * total if items is None else items)
    return Interactions(np.cumsum([0, *lengths]), found, np.zeros(total, dtype=np.int64), num_items)


BOUNDS = ("train_stop", "val_start", "val_stop", "test_start", "test_stop")


def parts(split: Split, interactions: Interactions) -> list[tuple[int, int, int]]:
    """(training interactions, first answer, answers) of each user, counted from his first interaction."""
    rows = zip(interactions.offsets[:-1], *(getattr(split, name) for name in BOUNDS), strict=True)
    found = []
    for first, train, val_start, val_stop, test_start, test_stop in rows:
        assert first <= train <= val_start <= val_stop <= test_start <= test_stop
        assert val_start == val_stop or test_start == test_stop
        start, stop = (val_start, val_stop) if val_stop > val_start else (test_start, test_stop)
        found.append((train - first, start - first, stop - start))
    return found


def users_of(split: Split, interactions: Interactions) -> dict[str, list[int]]:
    """Users of each part."""
    return {
        "train": np.flatnonzero(split.train_stop > interactions.offsets[:-1]).tolist(),
        "val": np.flatnonzero(split.val_stop > split.val_start).tolist(),
        "test": np.flatnonzero(split.test_stop > split.test_start).tolist(),
    }


# ------------------------------------------------------------------------------------------------- leave one out


def test_the_last_two_items_are_held_out_where_a_user_has_three():
    interactions = interactions_of([1, 2, 3, 4])
    split = LeaveOneOut()(interactions)
    assert split.train_stop.tolist() == split.val_start.tolist() == [1, 3, 4, 8]
    assert split.val_stop.tolist() == split.test_start.tolist() == [1, 3, 5, 9]
    assert split.test_stop.tolist() == [1, 3, 6, 10]
    assert split.sizes == (2, 2)


# ---------------------------------------------------------------------------------------------------- user split


def test_users_are_shared_out_and_no_held_out_user_is_trained_on():
    lengths = [2 + user % 9 for user in range(100)]
    interactions = interactions_of(lengths)
    split = UserSplit(val_users=0.1, test_users=0.2)(interactions)
    users = users_of(split, interactions)
    assert {name: len(found) for name, found in users.items()} == {"train": 70, "val": 10, "test": 20}
    assert sorted([user for found in users.values() for user in found]) == list(range(100))
    for user, (trained, first_answer, answers) in enumerate(parts(split, interactions)):
        if user in users["train"]:
            assert (trained, first_answer, answers) == (lengths[user], lengths[user], 0)
        else:
            assert trained == 0
            assert answers == lengths[user] - first_answer > 0
    answers = [sum(parts(split, interactions)[user][2] for user in users[stage]) for stage in ("val", "test")]
    assert split.sizes == tuple(answers)


@pytest.mark.parametrize(
    ("history", "known"),
    [
        (0.8, {2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 9: 7, 10: 8, 35: 28}),
        (0.29, {2: 1, 3: 1, 7: 2, 100: 29}),  # 0.29 * 100 is 28.999999999999996
        (0.01, {2: 1, 100: 1}),
        (0.9999999, {2: 1, 3: 2, 100: 99}),
    ],
)
def test_the_first_share_of_a_held_out_user_is_history_and_all_the_rest_are_answers(history, known):
    for length, expected in known.items():
        interactions = interactions_of([length] * 10)
        split = UserSplit(0.4, 0.4, history)(interactions)
        held_out = [part for part in parts(split, interactions) if part[2]]
        assert held_out == [(0, expected, length - expected)] * 8


def test_a_user_with_one_interaction_is_trained_on_and_never_drawn():
    interactions = interactions_of([1, 5] * 10)
    for seed in range(20):
        users = users_of(UserSplit(0.3, 0.3, seed=seed)(interactions), interactions)
        assert set(range(0, 20, 2)) < set(users["train"])
        assert {name: len(found) for name, found in users.items()} == {"train": 14, "val": 3, "test": 3}


def test_the_draw_follows_the_seed_and_any_user_may_be_drawn():
    interactions = interactions_of([5] * 20)
    drawn = [users_of(UserSplit(seed=seed)(interactions), interactions) for seed in range(100)]
    assert drawn[3] == users_of(UserSplit(seed=3)(interactions), interactions)
    for stage in ("val", "test"):
        assert {user for users in drawn for user in users[stage]} == set(range(20))
    assert len({tuple(users["test"]) for users in drawn}) > 50


def test_the_draw_does_not_look_at_items():
    one = interactions_of([5] * 20)
    other = interactions_of([5] * 20, list(range(1, 101)), 100)
    for name in BOUNDS:
        assert getattr(UserSplit()(one), name).tolist() == getattr(UserSplit()(other), name).tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_users": 0.0}, r"data\.split\.val_users=0\.0 must be a share: more than 0 and less than 1"),
        ({"test_users": 1.0}, r"data\.split\.test_users=1\.0 must be a share"),
        ({"history": float("nan")}, r"data\.split\.history=nan must be a share"),
        ({"history": 1.0}, r"data\.split\.history=1\.0 must be a share"),
        ({"val_users": 0.5, "test_users": 0.5}, r"val_users=0\.5 and test_users=0\.5 leave no user to train on"),
        ({"seed": -1}, r"data\.split\.seed=-1 must be 0 or more"),
    ],
)
def test_a_user_split_that_makes_no_sense_is_refused_at_birth(settings, message):
    with pytest.raises(InputError, match=message):
        UserSplit(**settings)


@pytest.mark.parametrize(
    ("settings", "lengths", "part"),
    [
        ({"val_users": 0.04}, [5] * 10, "val"),
        ({"test_users": 0.04}, [5] * 10, "test"),
        ({"val_users": 0.4, "test_users": 0.4}, [5, 5], "train"),
        ({}, [1] * 100, "val"),
    ],
)
def test_a_part_without_users_is_one_clear_line(settings, lengths, part):
    with pytest.raises(InputError, match=rf"leaves no user for {part} of the .* change its shares"):
        UserSplit(**settings)(interactions_of(lengths))


# -------------------------------------------------------------------------------------------------- training part


@pytest.mark.parametrize("splitter", [LeaveOneOut(), UserSplit(0.3, 0.3)])
def test_the_training_part_is_the_training_interactions_without_cold_items(splitter):
    rng = random.Random(3)
    lengths = [1, 2, 3, 4, 9, 12, 30]
    items = [rng.randrange(1, 9) for _ in range(sum(lengths))]
    interactions = interactions_of(lengths, items, 9)
    split = splitter(interactions)
    for cold in ([], [4], [1, 2, 3, 8, 9], list(range(1, 10))):
        part = training_part(interactions, dataclasses.replace(split, cold=np.array(cold, dtype=np.int64)))
        own = [part.items[begin:end].tolist() for begin, end in zip(part.first, part.stop, strict=True)]
        bounds = zip(interactions.offsets[:-1], split.train_stop, strict=True)
        expected = [[item for item in items[begin:end] if item not in cold] for begin, end in bounds]
        assert own == expected
        counts = Counter(item for items in expected for item in items)
        assert part.counts(9).tolist() == [counts[item] for item in range(10)]


def test_without_cold_items_the_training_part_copies_nothing():
    interactions = interactions_of([1, 3, 5])
    assert training_part(interactions, LeaveOneOut()(interactions)).items is interactions.items


def test_a_split_holds_no_item_out_unless_it_is_told():
    interactions = interactions_of([1, 3, 5])
    assert Split(*[interactions.offsets[1:]] * 5).cold.tolist() == []
    assert LeaveOneOut()(interactions).cold.tolist() == []


# ----------------------------------------------------------------------------------------------------- cold items


def test_cold_items_are_different_real_items_of_the_share_asked_for():
    drawn = draw_cold(1000, 0.05, seed=0)
    assert len(set(drawn.tolist())) == len(drawn) == 50
    assert drawn.tolist() == sorted(drawn)
    assert drawn.dtype == np.int64
    assert draw_cold(1000, 0.0, seed=0).tolist() == []
    every = set().union(*(draw_cold(20, 0.2, seed).tolist() for seed in range(200)))
    assert every == set(range(1, 21)), "any item may be drawn, and padding never"


def test_cold_items_follow_from_the_number_of_items_the_share_and_the_seed():
    assert draw_cold(100, 0.2, 7).tolist() == draw_cold(100, 0.2, 7).tolist()
    assert draw_cold(100, 0.2, 7).tolist() != draw_cold(100, 0.2, 8).tolist()
    assert set(draw_cold(100, 0.1, 7)) < set(draw_cold(100, 0.2, 7)), "a larger share holds a smaller one"
