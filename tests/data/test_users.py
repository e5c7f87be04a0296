"""User features: categories and bins by hand, read off the training users alone."""

import math

import numpy as np
import polars as pl
import pytest

from recsys_lightning.data.users import encode_users
from recsys_lightning.errors import InputError


def encoded(column: list, is_trained: list[bool] | None = None):
    """The codes of one feature, and its size."""
    kind = pl.String if any(isinstance(value, str) for value in column) else pl.Float64
    table = pl.DataFrame({"user_id": [str(n) for n in range(len(column))], "x": pl.Series(column, dtype=kind)})
    found = encode_users(table, np.array(is_trained or [True] * len(column)))
    assert found.names == ("x",)
    assert found.codes.dtype == np.int64
    return found.codes[:, 0].tolist(), found.sizes[0]


def test_categories_are_numbered_by_value_and_what_no_training_user_has_is_0():
    assert encoded(["b", "a", None, "b", "c"], [True, True, True, True, False]) == ([2, 1, 0, 2, 0], 3)
    assert encoded([3.0, -1.0, None, 3.0, 7.0], [True, True, True, True, False]) == ([2, 1, 0, 2, 0], 3)


def test_numbers_are_categories_up_to_32_different_values_and_bins_beyond():
    codes, size = encoded([float(n % 32) for n in range(320)])
    assert (codes, size) == ([n % 32 + 1 for n in range(320)], 33)
    codes, size = encoded([float(n) for n in range(320)])
    assert size == 17
    assert sorted(codes) == codes
    assert [codes.count(code) for code in range(17)] == [0, 19, *[20] * 14, 21], "sixteen parts of like size"


def test_bins_are_those_of_the_training_users_and_values_beyond_theirs_fall_into_the_outer_ones():
    values = [float(n) for n in range(100)]
    beyond = [-1e9, 1e9, math.inf, -math.inf, math.nan, None]
    codes, size = encoded(values + beyond, [True] * 100 + [False] * 6)
    assert codes[-6:] == [1, size - 1, 0, 0, 0, 0]
    assert codes[:100] == encoded(values)[0]
    shifted, _ = encoded(values + [1e6] * 100, [True] * 100 + [False] * 100)
    assert shifted[:100] == encoded(values)[0], "a user who is not trained on moves no edge"


def test_every_bin_of_skewed_numbers_has_a_training_user():
    rng = np.random.default_rng(0)
    for values in (np.floor(rng.pareto(1.0, 500)), np.round(rng.normal(size=60), 1), [0.0] * 900 + list(range(40))):
        codes, size = encoded([float(value) for value in values])
        assert set(codes) == set(range(1, size))
        order = np.argsort(values, kind="stable")
        assert (np.diff(np.array(codes)[order]) >= 0).all(), "a larger number has no smaller code"


def test_features_stand_side_by_side_and_without_any_there_are_none():
    table = pl.DataFrame({"user_id": ["u", "v"], "age": [30.0, None], "country": ["no", "de"]})
    found = encode_users(table, np.array([True, True]))
    assert (found.names, found.sizes) == (("age", "country"), (2, 3))
    assert found.codes.tolist() == [[1, 2], [0, 1]]
    assert encode_users(table.select("user_id"), np.array([True, True])) is None


def test_a_feature_that_no_training_user_has_is_one_clear_line():
    with pytest.raises(InputError, match="no training user has a 'x'; leave it out of user_feature_columns"):
        encoded(["a", None], [False, True])
