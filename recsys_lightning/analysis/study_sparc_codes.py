"""How level-1 codes agree with the catalogue's categories, and with the codes of another training.

Axis letters: I items, C codes of level 1, G categories.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from sklearn.metrics import adjusted_mutual_info_score, homogeneity_score, normalized_mutual_info_score

from recsys_lightning.data.catalog import LIST_SEPARATOR, PATH_SEPARATOR
from recsys_lightning.errors import InputError

Ints = NDArray[np.int64]

CATEGORIES = "categories"  # the field that sources give the categories of an item in


def category_labels(fields: pl.DataFrame, field: str, level: int) -> list[str | None]:
    """The category of each item at one level of its first path; None where that path ends above, or there is none.

    ``Beauty > Makeup > Nails; Gifts`` is ``Makeup`` at level 2. An item that lies on several paths counts on the first
    alone: the measures take one label an item.

    Args:
        fields: of the catalogue, a row an item.
        field: that holds the paths.
        level: from 1.

    Raises:
        InputError: there is no such field, or the level is below 1.
    """
    if field not in fields.columns or field == "item_id":
        known = ", ".join(name for name in fields.columns if name != "item_id")
        raise InputError(f"the catalogue has no text field {field!r}; there are: {known or 'none'}")
    if level < 1:
        raise InputError(f"--levels {level}: levels of categories are counted from 1")
    path = pl.col(field).str.split(LIST_SEPARATOR).list.first().str.split(PATH_SEPARATOR)
    label = path.list.get(level - 1, null_on_oob=True).str.strip_chars()
    labels: list[str | None] = fields.select(label.replace("", None)).to_series().to_list()
    return labels


class Agreement(NamedTuple):
    """How far codes and categories are one grouping, over the items that have a category.

    Attributes:
        items: that have one.
        categories: G, different ones.
        largest: share of the largest category, which is the purity of codes that say nothing.
        purity: share of the items that are of the most frequent category of their code. It grows with the number of
            codes, up to 1 for a code an item.
        nmi: normalised mutual information, by the arithmetic mean of the entropies.
        ami: the same adjusted for chance: 0 is expected of codes drawn at random.
        homogeneity: 1 - H(category | code) / H(category).
    """

    items: int
    categories: int
    largest: float
    purity: float
    nmi: float
    ami: float
    homogeneity: float


def agreement(codes: Ints, labels: Sequence[str | None]) -> Agreement | None:
    """Compare the codes (I,) of items with their labels; None where the items have fewer than two different labels."""
    known = np.array([label is not None for label in labels])
    codes, (names, numbers) = (
        codes[known],
        np.unique([label for label in labels if label is not None], return_inverse=True),
    )
    if len(names) < 2:
        return None
    table = contingency(numbers, codes)  # (G, C)
    return Agreement(
        items=len(codes),
        categories=len(names),
        largest=float(table.sum(1).max() / len(codes)),
        purity=float(table.max(0).sum() / len(codes)),
        nmi=float(normalized_mutual_info_score(numbers, codes)),
        ami=float(adjusted_mutual_info_score(numbers, codes)),
        homogeneity=float(homogeneity_score(numbers, codes)),
    )


def contingency(rows: Ints, columns: Ints) -> Ints:
    """Items (rows, columns) of each pair of numbers, each counted from 0 to the highest there is."""
    table = np.zeros((int(rows.max()) + 1, int(columns.max()) + 1), dtype=np.int64)
    np.add.at(table, (rows, columns), 1)
    return table


class Change(NamedTuple):
    """What became of the codes of the items from one training to another.

    Attributes:
        nmi: normalised mutual information of both codings: 1 if they are one grouping, whatever the numbers.
        ami: the same adjusted for chance.
        renumbered: share of the items whose code has another number. Says something only where the second training
            started from the codes of the first.
        moved: share of the items that are not in the counterpart of their code.
        pairs: codes with their counterparts and the number of items in both, by the size of the first. Counterparts are
            matched one to one so that as many items as possible stay (Hungarian algorithm); pairs without a common item
            are left out.
    """

    nmi: float
    ami: float
    renumbered: float
    moved: float
    pairs: tuple[tuple[int, int, int], ...]


def change(before: Ints, after: Ints) -> Change:
    """Compare two codings (I,) of the same items."""
    table = contingency(before, after)  # (C, C')
    first, second = linear_sum_assignment(table, maximize=True)
    shared = table[first, second]
    order = np.argsort(-table.sum(1)[first], kind="stable")
    pairs = [(int(first[at]), int(second[at]), int(shared[at])) for at in order if shared[at] > 0]
    return Change(
        nmi=float(normalized_mutual_info_score(before, after)),
        ami=float(adjusted_mutual_info_score(before, after)),
        renumbered=float((before != after).mean()),
        moved=1 - float(shared.sum() / len(before)),
        pairs=tuple(pairs),
    )
