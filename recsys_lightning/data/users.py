"""What is known of the users beside what they met: columns of a users' table as small whole numbers.

Axis letters: U users, F features.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys_lightning.data.interactions import IntArray
from recsys_lightning.errors import InputError

MAX_NUMBERS = 32  # a number with more different values than these is cut into bins
NUM_BINS = 16


@dataclass(frozen=True)
class UserFeatures:
    """F features of U users, as codes for embedding tables.

    Attributes:
        names: (F,) names of the features.
        sizes: (F,) rows that an embedding table of each needs: its codes are in ``0..size-1``, and 0 is unknown.
        codes: (U, F).
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    codes: IntArray


def encode_users(table: pl.DataFrame, is_trained: npt.NDArray[np.bool_]) -> UserFeatures | None:
    """Codes of the users' features; what they stand for is read off the training users alone.

    A text, and a number of which training users have at most `MAX_NUMBERS` different values, is a category: 1, 2, ...
    by ascending value. Any other number is cut into at most `NUM_BINS` bins at quantiles of the training users; a value
    beyond all theirs falls into the first or the last bin. Null, infinity, NaN and a category that no training user has
    are 0.

    Args:
        table: U rows; ``user_id`` and one String or Float64 column a feature.
        is_trained: (U,) who is trained on.

    Returns:
        The features; None if the table has no column but the id.

    Raises:
        InputError: no training user has a value of some feature.
    """
    names = [name for name in table.columns if name != "user_id"]
    if not names:
        return None
    columns = [_encode(table.get_column(name), is_trained) for name in names]
    codes = np.stack([codes for codes, _ in columns], axis=1)  # (U, F)
    return UserFeatures(tuple(names), tuple(size for _, size in columns), codes)


def _encode(column: pl.Series, is_trained: npt.NDArray[np.bool_]) -> tuple[IntArray, int]:
    """Codes (U,) of one feature, and how many different ones there may be."""
    if column.dtype.is_float():
        column = column.set(~column.is_finite(), None)
    known = column.filter(pl.Series(is_trained)).drop_nulls()
    if known.is_empty():
        raise InputError(f"no training user has a {column.name!r}; leave it out of user_feature_columns")
    values = known.unique().sort()
    if column.dtype.is_float() and len(values) > MAX_NUMBERS:
        # At values that users have, so that no bin is empty.
        edges = np.unique(np.quantile(known.to_numpy(), np.arange(1, NUM_BINS) / NUM_BINS, method="inverted_cdf"))
        edges = edges[edges > values[0]]
        filled = column.fill_null(0.0).to_numpy()
        codes = np.where(column.is_null().to_numpy(), 0, 1 + np.searchsorted(edges, filled, side="right"))
        return codes.astype(np.int64), len(edges) + 2
    numbers = pl.int_range(1, len(values) + 1, eager=True)
    coded = column.replace_strict(values, numbers, default=0, return_dtype=pl.Int64).fill_null(0)
    return coded.to_numpy().astype(np.int64), len(values) + 1
