"""How far codes foretell the next item's: shares counted by hand, chance by drawing, and what cannot be asked."""

import math

import numpy as np
import pytest

from recsys_lightning.analysis.codes_agreement import (
    next_code_agreement,
    next_code_information,
    next_pairs,
    training_sequences,
)
from recsys_lightning.data.interactions import Interactions
from recsys_lightning.data.splits import LeaveOneOut
from recsys_lightning.errors import InputError

# Items 1 .. 4; row 0 is padding, with the codes of item 1.
CODES = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 0]])
# Pairs 1-2, 2-3, 3-4, 1-1 and 4-1. The second user has one item and the third none.
SEQUENCES = [np.array(items, dtype=np.int64) for items in ([1, 2, 3, 4], [2], [], [1, 1], [4, 1])]


def test_pairs_are_consecutive_items_of_one_user():
    assert next_pairs(SEQUENCES).tolist() == [[1, 2], [2, 3], [3, 4], [1, 1], [4, 1]]


def test_agreement_of_consecutive_items_is_counted_by_prefix():
    first, both = next_code_agreement(CODES, SEQUENCES)
    assert first.share == pytest.approx(3 / 5), "1-2, 3-4 and 1-1"
    assert both.share == pytest.approx(2 / 5), "3-4 and 1-1: items 1 and 2 differ in their second code"


def test_chance_is_that_of_two_items_drawn_by_how_often_they_are_met():
    # Items 1, 2, 3, 4 are met 4, 2, 1, 2 times, so that the prefixes 0-0, 0-1, 1-0 are met 4, 2, 3 times of 9.
    first, both = next_code_agreement(CODES, SEQUENCES)
    assert first.chance == pytest.approx((6 / 9) ** 2 + (3 / 9) ** 2)
    assert both.chance == pytest.approx((4 / 9) ** 2 + (2 / 9) ** 2 + (3 / 9) ** 2)
    rng = np.random.default_rng(0)
    met = np.concatenate(SEQUENCES)
    drawn = CODES[rng.choice(met, (20_000, 2))]  # (draws, 2, L)
    assert (drawn[:, 0] == drawn[:, 1]).all(-1).mean() == pytest.approx(both.chance, abs=0.015)


def test_prefixes_do_not_run_into_one_another():
    codes = np.array([[0, 0], [0, 2], [1, 0], [2, 0]])  # 0-2, 1-0 and 2-0 are three
    found = next_code_agreement(codes, [np.array([1, 2, 3])])
    assert [level.share for level in found] == [0, 0]
    assert found[1].chance == pytest.approx(1 / 3)


def test_information_is_that_of_the_two_codes_over_all_pairs():
    # Level 1 of the pairs: 0-0, 0-1, 1-1, 0-0, 1-0.
    def entropy(*counts: int) -> float:
        return -sum(n / 5 * math.log(n / 5) for n in counts)

    mutual = entropy(3, 2) + entropy(3, 2) - entropy(2, 1, 1, 1)
    assert next_code_information(CODES[:, 0], SEQUENCES) == pytest.approx(mutual / entropy(3, 2))


def test_information_is_all_where_the_next_code_follows_from_this_one_and_none_where_it_does_not():
    codes = np.array([0, 0, 1, 2])
    assert next_code_information(codes, [np.array([1, 2, 3, 1, 2, 3, 1])]) == pytest.approx(1)
    rng = np.random.default_rng(0)
    assert next_code_information(codes, [rng.integers(1, 4, 5000)]) < 0.002


def test_without_two_items_in_a_row_there_is_nothing_to_ask():
    for sequences in ([], [np.array([1]), np.array([2])], [np.array([], dtype=np.int64)]):
        with pytest.raises(InputError, match="no user has two training interactions"):
            next_pairs(sequences)


def test_training_sequences_hold_neither_answers_nor_cold_items():
    log = Interactions(np.array([0, 5, 9]), np.array([1, 2, 3, 4, 5, 5, 4, 3, 2]), np.arange(9), 5)
    split = LeaveOneOut()(log)
    assert [items.tolist() for items in training_sequences(log, split)] == [[1, 2, 3], [5, 4]]
    cold = type(split)(**{**vars(split), "cold": np.array([2, 4])})
    assert [items.tolist() for items in training_sequences(log, cold)] == [[1, 3], [5]]
