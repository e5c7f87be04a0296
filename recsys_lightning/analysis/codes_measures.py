"""How far codes agree with the catalogue's categories, and with the codes of another tokenizer or training.

Codes are compared as groupings of the items, by prefixes of any length. Deep prefixes have many small cells, which
agree with anything: purity and mutual information grow with the number of cells alone. So every measure stands beside
what it is of the same cells with the items dealt out at random, and adjusted measures count from there.

Axis letters: I items, C prefixes in use, G categories.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from sklearn.metrics import homogeneity_completeness_v_measure
from sklearn.metrics.cluster import contingency_matrix

from recsys_lightning.data.catalog import LIST_SEPARATOR, PATH_SEPARATOR
from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.table import SemanticIds

Ints = NDArray[np.int64]
Labels = Sequence[str | None]
"""(I,) category of each item, None where it has none."""

CATEGORIES = "categories"  # the field that sources give the categories of an item in
DRAWS = 5  # deals of the items over the cells, of which chance is the mean
_ALL = 1 - 1e-6  # what chance reaches, the codes cannot be above by more than rounding


# --------------------------------------------------------------------------------------------------------- categories


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


def telling_level(labels: dict[int, list[str | None]]) -> int | None:
    """The first level of categories at which items differ; None if there is none."""
    return next((level for level, of in labels.items() if len(set(of) - {None}) > 1), None)


# ------------------------------------------------------------------------------------------------------------ prefixes


def prefix_numbers(table: SemanticIds, level: int) -> tuple[Ints, Ints]:
    """Number (I,) of each item's prefix of `level` codes, and the prefixes (C, level) by number, in ascending order.

    Raises:
        InputError: the table has no such level.
    """
    if not 1 <= level <= table.num_levels:
        raise InputError(f"there are no codes of level {level}: these semantic IDs have levels 1 to {table.num_levels}")
    codes = table.codes[1:, :level].cpu().numpy()
    prefixes, number = np.unique(codes, axis=0, return_inverse=True)
    return number.reshape(-1).astype(np.int64), prefixes


# ------------------------------------------------------------------------------------------------------------ measures


class Shares(NamedTuple):
    """How far groups of items are one with the items' categories; each between 0 and 1.

    Attributes:
        purity: share of the items that are of the most frequent category of their group.
        nmi: normalised mutual information, by the arithmetic mean of the entropies.
        homogeneity: 1 - H(category | group) / H(category): 1 if no group mixes categories.
        completeness: 1 - H(group | category) / H(group): 1 if no category is split over groups.
    """

    purity: float
    nmi: float
    homogeneity: float
    completeness: float


class Adjusted(NamedTuple):
    """`Shares` counted from chance, ``(found - chance) / (1 - chance)``: 0 of codes at random, 1 at best.

    None where chance reaches 1. That of the mutual information is what is called adjusted mutual information (AMI).
    """

    purity: float | None
    nmi: float | None
    homogeneity: float | None
    completeness: float | None


class Agreement(NamedTuple):
    """How far codes and categories are one grouping, over the items that have a category.

    Attributes:
        items: that have one.
        cells: C, different codes among them.
        categories: G, different ones.
        largest: share of the largest category, which is the purity of codes that say nothing.
        found: of the codes.
        chance: of the same codes dealt out to the items at random, the mean of several deals.
    """

    items: int
    cells: int
    categories: int
    largest: float
    found: Shares
    chance: Shares

    @property
    def nmi(self) -> float:
        """Normalised mutual information of the codes and the categories."""
        return self.found.nmi

    @property
    def adjusted(self) -> Adjusted:
        """What the codes reach, counted from chance."""
        return Adjusted(*(above_chance(*both) for both in zip(self.found, self.chance, strict=True)))


def agreement(codes: Ints, labels: Labels, seed: int = 0) -> Agreement | None:
    """Compare the codes (I,) of items with their labels; None where the items have fewer than two different labels.

    Args:
        codes: a number an item: a code, or the number of a prefix.
        labels: a category an item.
        seed: of the deals that chance is measured by.
    """
    known = np.array([label is not None for label in labels])
    names, numbers = np.unique([label for label in labels if label is not None], return_inverse=True)
    if len(names) < 2:
        return None
    codes = codes[known]
    rng = np.random.default_rng(seed)
    dealt = np.array([_shares(rng.permutation(codes), numbers) for _ in range(DRAWS)])
    return Agreement(
        items=len(codes),
        cells=len(np.unique(codes)),
        categories=len(names),
        largest=float(np.bincount(numbers).max() / len(codes)),
        found=_shares(codes, numbers),
        chance=Shares(*dealt.mean(0).tolist()),
    )


def _shares(codes: Ints, numbers: Ints) -> Shares:
    homogeneity, completeness, nmi = homogeneity_completeness_v_measure(numbers, codes)
    purity = contingency_matrix(numbers, codes, sparse=True).max(0).sum() / len(codes)  # of (G, C)
    return Shares(float(purity), float(nmi), float(homogeneity), float(completeness))


def above_chance(found: float, chance: float) -> float | None:
    """``(found - chance) / (1 - chance)``; None where chance reaches 1, so that nothing can be above it."""
    return (found - chance) / (1 - chance) if chance < _ALL else None


# --------------------------------------------------------------------------------------------------------- two codings


class Mutual(NamedTuple):
    """How far two codings of the same items are one grouping, whatever the numbers of the codes.

    Attributes:
        nmi: normalised mutual information, by the arithmetic mean of the entropies.
        chance: the same with the codes of one dealt out to the items at random, the mean of several deals.
        ami: counted from chance; None where chance reaches 1, as of codings that give each item a code of its own.
    """

    nmi: float
    chance: float
    ami: float | None


def mutual_information(first: Ints, second: Ints, seed: int = 0) -> Mutual:
    """Compare two codings (I,) of the same items; `seed` is of the deals that chance is measured by."""
    rng = np.random.default_rng(seed)
    nmi = float(homogeneity_completeness_v_measure(first, second)[2])
    dealt = [homogeneity_completeness_v_measure(first, rng.permutation(second))[2] for _ in range(DRAWS)]
    chance = float(np.mean(dealt))
    return Mutual(nmi, chance, above_chance(nmi, chance))


class Change(NamedTuple):
    """What became of the level-1 codes of the items from one training to another.

    Attributes:
        renumbered: share of the items whose code has another number. Says something only where the second training
            started from the codes of the first.
        moved: share of the items that are not in the counterpart of their code.
        pairs: codes with their counterparts and the number of items in both, by the size of the first. Counterparts are
            matched one to one so that as many items as possible stay (Hungarian algorithm); pairs without a common item
            are left out.
    """

    renumbered: float
    moved: float
    pairs: tuple[tuple[int, int, int], ...]


def change(before: Ints, after: Ints) -> Change:
    """Compare the level-1 codes (I,) that two trainings give the same items."""
    table = np.zeros((int(before.max()) + 1, int(after.max()) + 1), dtype=np.int64)  # (C, C')
    np.add.at(table, (before, after), 1)
    first, second = linear_sum_assignment(table, maximize=True)
    shared = table[first, second]
    order = np.argsort(-table.sum(1)[first], kind="stable")
    pairs = [(int(first[at]), int(second[at]), int(shared[at])) for at in order if shared[at] > 0]
    return Change(
        renumbered=float((before != after).mean()),
        moved=1 - float(shared.sum() / len(before)),
        pairs=tuple(pairs),
    )
