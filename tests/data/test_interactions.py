"""Interactions: what is refused, how they are numbered and ordered, the k-core."""

import random
from collections import Counter

import numpy as np
import polars as pl
import pytest

from recsys_lightning.data.interactions import Interactions, k_core
from recsys_lightning.errors import InputError

Row = tuple[str, str, int]


def frame(rows: list[Row]) -> pl.DataFrame:
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def random_rows(rng: random.Random, count: int, users: int, items: int, times: int) -> list[Row]:
    return [(f"u{rng.randrange(users)}", f"i{rng.randrange(items)}", rng.randrange(times)) for _ in range(count)]


def raw_histories(rows: list[Row]) -> dict[str, list[tuple[str, int]]]:
    """What `Interactions.from_frame` holds, in raw ids again: user to (item, time), oldest first."""
    interactions, users, items = Interactions.from_frame(frame(rows))
    bounds = zip(interactions.offsets[:-1], interactions.offsets[1:], strict=True)
    return {
        user: [(items[interactions.items[n] - 1], int(interactions.timestamps[n])) for n in range(begin, end)]
        for user, (begin, end) in zip(users, bounds, strict=True)
    }


# --------------------------------------------------------------------------------------------------- validation


def build(offsets=(0, 2, 3), items=(1, 2, 2), timestamps=(5, 6, 1), num_items=2) -> Interactions:
    return Interactions(np.array(offsets), np.array(items), np.array(timestamps), num_items)


def test_sound_interactions_say_their_sizes():
    interactions = build(num_items=9)  # items that nobody met are legal
    assert (interactions.num_users, len(interactions), interactions.num_items) == (2, 3, 9)
    assert interactions.lengths.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"offsets": (1, 2, 3)}, "offsets must run from 0 to 3"),
        ({"offsets": (0, 2, 4)}, "offsets must run from 0 to 3"),
        ({"offsets": ()}, "offsets must run from 0 to 3"),
        ({"offsets": ((0, 2, 3),)}, "offsets must run from 0 to 3"),
        ({"offsets": (0, 0, 3)}, "at least one interaction"),
        ({"offsets": (0, 2, 1, 3)}, "at least one interaction"),
        ({"timestamps": (5, 6)}, "3 items but 2 timestamps"),
        ({"items": (0, 2, 2)}, r"in 1\.\.2, got 0\.\.2"),  # 0 is padding
        ({"items": (1, 3, 2)}, r"in 1\.\.2, got 1\.\.3"),
        ({"timestamps": (6, 5, 9)}, "must not decrease within a user"),
    ],
)
def test_what_breaks_a_promise_is_refused(broken, message):
    with pytest.raises(ValueError, match=message):
        build(**broken)


def test_time_may_go_back_from_one_user_to_the_next_only():
    build(offsets=(0, 2, 3), timestamps=(5, 6, 1))
    with pytest.raises(ValueError, match="must not decrease"):
        build(offsets=(0, 3), timestamps=(5, 6, 1))


# --------------------------------------------------------------------------------------------- order and numbers


def test_users_and_items_are_numbered_by_first_appearance_and_rows_sorted_by_time():
    rows = [("bob", "tent", 9), ("amy", "doll", 4), ("bob", "soap", 3), ("amy", "tent", 2), ("bob", "doll", 9)]
    interactions, users, items = Interactions.from_frame(frame(rows))
    assert users == ["bob", "amy"]
    assert items == ["tent", "doll", "soap"]  # 1, 2, 3
    assert interactions.offsets.tolist() == [0, 3, 5]
    assert interactions.items.tolist() == [3, 1, 2, 1, 2]  # bob's tent and doll tie at 9: file order
    assert interactions.timestamps.tolist() == [3, 9, 9, 2, 4]
    assert interactions.num_items == 3


def test_equal_times_keep_file_order():
    rows = random_rows(random.Random(0), 1000, users=4, items=300, times=3)  # sorted with pandas' or numpy's default
    expected: dict[str, list[tuple[str, int]]] = {}  # sort, 1,000 rows of 3 times come out in another order
    for user, item, time in sorted(rows, key=lambda row: row[2]):
        expected.setdefault(user, []).append((item, time))
    assert raw_histories(rows) == expected


def test_shuffling_rows_of_distinct_times_changes_nothing_but_the_numbers():
    rng = random.Random(1)
    rows = [(user, item, time) for time, (user, item, _) in enumerate(random_rows(rng, 300, 20, 50, 1))]
    shuffled = rng.sample(rows, len(rows))
    assert raw_histories(shuffled) == raw_histories(rows)
    assert Interactions.from_frame(frame(shuffled))[1:] != Interactions.from_frame(frame(rows))[1:]


def test_saved_interactions_are_mapped_and_equal(tmp_path):
    saved = Interactions.from_frame(frame(random_rows(random.Random(2), 100, 9, 9, 50)))[0]
    saved.save(tmp_path)
    loaded = Interactions.load(tmp_path, saved.num_items)
    for name in ("offsets", "items", "timestamps"):
        assert isinstance(getattr(loaded, name), np.memmap)
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name))
    with pytest.raises(ValueError, match="read-only"):
        loaded.items[0] = 1


# -------------------------------------------------------------------------------------------------------- k-core


def k_core_one_by_one(rows: list[Row], k: int) -> list[Row]:
    """Drops one row of a too rare user or item at a time, the last such row first."""
    rows = list(rows)
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        rare = [n for n, (user, item, _) in enumerate(rows) if users[user] < k or items[item] < k]
        if not rare:
            return rows
        del rows[rare[-1]]


@pytest.mark.parametrize("seed", range(20))
def test_k_core_equals_dropping_rows_one_by_one_and_is_a_fixpoint(seed):
    rng = random.Random(seed)
    k = rng.randrange(2, 5)
    rows = random_rows(rng, rng.randrange(1, 150), users=30, items=30, times=5)
    kept = k_core(frame(rows), k)
    assert kept.rows() == k_core_one_by_one(rows, k)
    assert k_core(kept, k).equals(kept)


def test_k_core_goes_on_until_nothing_changes():
    # d leaves with z, then c with y, then b with x: each removal makes the next one due.
    rows = [("a", "w", 0), ("a", "x", 1), ("b", "x", 2), ("b", "y", 3), ("c", "y", 4), ("c", "z", 5), ("d", "z", 6)]
    assert k_core(frame(rows), 2).is_empty()
    square = [("p", "m", 0), ("p", "n", 1), ("q", "m", 2), ("q", "n", 3)]
    assert k_core(frame([*rows, *square]), 2).rows() == square


@pytest.mark.parametrize("k", [0, 1])
def test_k_core_of_one_keeps_all(k):
    rows = [("a", "x", 0), ("b", "y", 1)]
    assert k_core(frame(rows), k).rows() == rows


def test_a_negative_k_core_is_refused():
    with pytest.raises(InputError, match="k_core=-1"):
        k_core(frame([]), -1)
