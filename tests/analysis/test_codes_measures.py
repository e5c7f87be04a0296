"""Codes against categories and against other codes: measures by hand, what chance reaches, and counterparts."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score

from recsys_lightning.analysis.codes_measures import (
    agreement,
    category_labels,
    change,
    mutual_information,
    prefix_numbers,
    telling_level,
)
from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.table import SemanticIds


def entropy(counts: list[int]) -> float:
    return -sum(n / sum(counts) * math.log(n / sum(counts)) for n in counts if n)


def test_the_category_of_a_level_is_that_of_the_first_path():
    table = pl.DataFrame({"item_id": ["a", "b", "c", "d"], "kind": ["A > B; C > D", "C", None, ""]})
    assert category_labels(table, "kind", 1) == ["A", "C", None, None]
    assert category_labels(table, "kind", 2) == ["B", None, None, None]
    assert category_labels(table, "kind", 3) == [None] * 4
    with pytest.raises(InputError, match="no text field 'knid'; there are: kind"):
        category_labels(table, "knid", 1)
    with pytest.raises(InputError, match="counted from 1"):
        category_labels(table, "kind", 0)


def test_the_telling_level_is_the_first_at_which_items_differ():
    assert telling_level({1: ["A", "A", None], 2: ["B", None, "C"], 3: ["D", "E", "F"]}) == 2
    assert telling_level({1: ["A", None], 2: [None, None]}) is None


def test_prefixes_are_numbered_in_ascending_order():
    codes = torch.tensor([[0, 0, 0], [2, 1, 0], [0, 2, 0], [2, 1, 1], [2, 0, 0]])
    table = SemanticIds(codes, 3, "f" * 64, "by hand")
    number, prefixes = prefix_numbers(table, 2)
    assert prefixes.tolist() == [[0, 2], [2, 0], [2, 1]]
    assert number.tolist() == [2, 0, 2, 1]
    assert prefix_numbers(table, 1)[0].tolist() == [1, 0, 1, 1]
    assert len(prefix_numbers(table, 3)[1]) == 4
    for level in (0, 4):
        with pytest.raises(InputError, match=f"no codes of level {level}: these semantic IDs have levels 1 to 3"):
            prefix_numbers(table, level)


# ------------------------------------------------------------------------------------------------------- categories


def test_agreement_is_the_formulas_of_its_docstring_over_the_items_with_a_category():
    codes = np.array([0, 0, 0, 3, 3, 3, 3, 1])
    labels = ["x", "x", "y", "y", "y", "z", "z", None]
    found = agreement(codes, labels)
    # Code 0 holds x x y, code 3 holds y y z z.
    assert (found.items, found.cells, found.categories) == (7, 2, 3)
    assert found.largest == pytest.approx(3 / 7)
    assert found.found.purity == pytest.approx((2 + 2) / 7)
    of_codes, of_labels = entropy([3, 4]), entropy([2, 3, 2])
    rest = 3 / 7 * entropy([2, 1]) + 4 / 7 * entropy([2, 2])  # H(category | code)
    assert found.found.homogeneity == pytest.approx(1 - rest / of_labels)
    split = 2 / 7 * entropy([2]) + 3 / 7 * entropy([1, 2]) + 2 / 7 * entropy([2])  # H(code | category)
    assert found.found.completeness == pytest.approx(1 - split / of_codes)
    assert found.nmi == pytest.approx((of_labels - rest) / ((of_codes + of_labels) / 2))


def test_codes_that_are_the_categories_agree_wholly_and_random_ones_not_beyond_chance():
    labels = [f"c{at % 4}" for at in range(400)]
    same = agreement(np.arange(400) % 4, labels)
    assert (*same.found, *same.adjusted) == pytest.approx((1,) * 8)
    drawn = agreement(np.random.default_rng(0).integers(0, 64, 400), labels)
    assert drawn.nmi > 0.05, "many codes share information with anything"
    assert drawn.found.purity > 0.4, "and small cells are pure"
    assert drawn.adjusted == pytest.approx((0,) * 4, abs=0.03)


def test_chance_is_what_the_same_cells_reach_with_the_items_dealt_out_anew():
    rng = np.random.default_rng(0)
    labels = [f"c{at}" for at in rng.integers(0, 3, 300)]
    codes = rng.integers(0, 30, 300)
    found = agreement(codes, labels)
    # Purity by hand, over deals of its own.
    numbers = np.unique(labels, return_inverse=True)[1]
    purities = []
    for _ in range(200):
        dealt = rng.permutation(codes)
        purities.append(sum(np.bincount(numbers[dealt == code]).max() for code in np.unique(codes)) / 300)
    assert found.chance.purity == pytest.approx(np.mean(purities), abs=0.02)
    assert found.adjusted.purity == pytest.approx(
        (found.found.purity - found.chance.purity) / (1 - found.chance.purity)
    )
    assert agreement(codes, labels, seed=1).chance != found.chance, "the seed is of the deals"
    assert agreement(codes, labels, seed=1).found == found.found


def test_adjusted_information_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 2000)
    codes = np.where(rng.random(2000) < 0.4, labels, rng.integers(0, 200, 2000))
    expected = adjusted_mutual_info_score(labels, codes)
    assert agreement(codes, [str(label) for label in labels]).adjusted.nmi == pytest.approx(expected, abs=0.005)
    assert mutual_information(labels, codes).ami == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("labels", [["x"] * 8, [None] * 8, ["x", None] * 4])
def test_without_two_categories_there_is_nothing_to_agree_with(labels):
    assert agreement(np.arange(8) % 2, labels) is None


def test_where_every_item_has_a_code_of_its_own_nothing_can_be_above_chance():
    found = agreement(np.arange(6), ["x", "y"] * 3)
    assert (found.found.purity, found.found.homogeneity) == pytest.approx((1, 1))
    assert (found.adjusted.purity, found.adjusted.homogeneity) == (None, None)
    assert mutual_information(np.arange(6), np.arange(6)[::-1]).ami is None


# ------------------------------------------------------------------------------------------------------- two codings


def test_a_coding_under_other_numbers_has_changed_its_numbers_only():
    before, after = np.array([0, 0, 1, 1, 2, 2]), np.array([2, 2, 0, 0, 1, 1])
    found, mutual = change(before, after), mutual_information(before, after)
    assert (mutual.nmi, mutual.ami) == pytest.approx((1, 1))
    assert mutual.chance < 1
    assert found.moved == pytest.approx(0)
    assert found.renumbered == 1
    assert sorted(found.pairs) == [(0, 2, 2), (1, 0, 2), (2, 1, 2)]


def test_codings_that_have_nothing_in_common_agree_no_more_than_chance():
    rng = np.random.default_rng(0)
    found = mutual_information(rng.integers(0, 40, 500), rng.integers(0, 40, 500))
    assert found.nmi > 0.2
    assert found.ami == pytest.approx(0, abs=0.03)


def test_moved_items_are_those_outside_the_counterpart_of_their_code():
    before = np.array([0, 0, 0, 0, 1, 1, 1])
    after = np.array([5, 5, 5, 1, 1, 1, 0])  # 0 -> 5 keeps three, 1 -> 1 keeps two
    found = change(before, after)
    assert found.moved == pytest.approx(2 / 7)
    assert found.renumbered == pytest.approx(5 / 7)
    assert found.pairs == ((0, 5, 3), (1, 1, 2))


def test_counterparts_are_matched_as_a_whole_and_not_one_after_the_other():
    # Code 0 shares most with 0, but then code 1 would be left with nothing: 3 + 3 items stay rather than 4.
    before = np.array([0] * 7 + [1] * 3)
    after = np.array([0] * 4 + [1] * 3 + [0] * 3)
    assert change(before, after).moved == pytest.approx(4 / 10)
