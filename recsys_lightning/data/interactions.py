"""Who met what, when: one row an interaction, grouped by user, oldest first, on CSR offsets.

Axis letters: U users, I items, N interactions. Item ids run 1..I; 0 is padding. Users run 0..U-1.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys_lightning.errors import InputError

IntArray = npt.NDArray[np.int64]


def k_core(interactions: pl.DataFrame, k: int) -> pl.DataFrame:
    """The largest subset in which every user and every item has at least `k` interactions.

    Users and items below `k` are dropped in turn until nothing changes; the result does not depend on the order. Row
    order is kept. `k` of 0 or 1 returns the input.
    """
    if k < 0:
        raise InputError(f"k_core={k} must be 0 or more")
    while k > 1:
        size = len(interactions)
        for column in ("user_id", "item_id"):
            interactions = interactions.filter(pl.len().over(column) >= k)
        if len(interactions) == size:
            break
    return interactions


@dataclass(frozen=True)
class Interactions:
    """Interactions of U users with I items, validated at birth.

    Attributes:
        offsets: (U+1,) user u owns the rows ``offsets[u]:offsets[u+1]``.
        items: (N,) item ids in 1..num_items.
        timestamps: (N,) not decreasing within a user.
        num_items: I; items that nobody met are legal.
    """

    offsets: IntArray
    items: IntArray
    timestamps: IntArray
    num_items: int

    def __post_init__(self) -> None:
        offsets, items, times = self.offsets, self.items, self.timestamps
        if offsets.ndim != 1 or len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(items):
            raise ValueError(f"offsets must run from 0 to {len(items)} interactions, got {offsets[:1]}..{offsets[-1:]}")
        if (np.diff(offsets) < 1).any():
            raise ValueError("every user needs at least one interaction")
        if len(times) != len(items):
            raise ValueError(f"{len(items)} items but {len(times)} timestamps")
        if len(items) and (items.min() < 1 or items.max() > self.num_items):
            raise ValueError(f"item ids must be in 1..{self.num_items}, got {items.min()}..{items.max()}")
        step_back = np.diff(times) < 0
        step_back[offsets[1:-1] - 1] = False  # from one user to the next time may go back
        if step_back.any():
            raise ValueError("timestamps must not decrease within a user")

    @classmethod
    def from_frame(cls, frame: pl.DataFrame) -> tuple["Interactions", list[str], list[str]]:
        """Build from columns ``user_id``, ``item_id``, ``timestamp`` in file order.

        Users and items are numbered by first appearance in the file. Within a user rows are sorted by time; equal times
        keep file order (the sort is stable).

        Returns:
            The interactions, the raw ids of the users (U) and of the items (I, item i is at index i-1).
        """
        users = frame.get_column("user_id").unique(maintain_order=True)
        items = frame.get_column("item_id").unique(maintain_order=True)
        user_numbers = pl.int_range(len(users), eager=True)
        item_numbers = pl.int_range(1, len(items) + 1, eager=True)
        coded = frame.select(
            user=pl.col("user_id").replace_strict(users, user_numbers, return_dtype=pl.Int64),
            item=pl.col("item_id").replace_strict(items, item_numbers, return_dtype=pl.Int64),
            timestamp="timestamp",
        ).sort("user", "timestamp", maintain_order=True)
        counts = np.bincount(coded["user"].to_numpy(), minlength=len(users))
        interactions = cls(
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            items=coded["item"].to_numpy().astype(np.int64),
            timestamps=coded["timestamp"].to_numpy().astype(np.int64),
            num_items=len(items),
        )
        return interactions, users.to_list(), items.to_list()

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> IntArray:
        """(U,) interactions of each user."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.items)

    def save(self, folder: Path) -> None:
        """Write one ``.npy`` file an array into `folder`."""
        for name in ("offsets", "items", "timestamps"):
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path, num_items: int) -> "Interactions":
        """Memory-map what `save` wrote, so that every process of a machine shares one copy."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("offsets", "items", "timestamps")}
        return cls(num_items=num_items, **arrays)


def draw_cold(num_items: int, share: float, seed: int) -> IntArray:
    """Ids, ascending, of the items that are held out of training: a function of these three numbers and nothing else.

    A larger share holds the items of a smaller one and more.

    Args:
        num_items: I.
        share: of the items, rounded to whole ones; 0 draws none.
        seed: of the draw, 0 or more.

    Raises:
        InputError: the share is not in 0..<1, or is of no item or of all.
    """
    if not 0 <= share < 1:
        raise InputError(f"data.cold_items={share} must be a share of the items, from 0 to less than 1")
    count = round(share * num_items)
    if share and count == 0:
        raise InputError(f"data.cold_items={share} of {num_items:,} items is not even one; raise it")
    if count == num_items > 0:
        raise InputError(f"data.cold_items={share} of {num_items:,} items leaves none to train on; lower it")
    return np.sort(np.random.default_rng(seed).permutation(num_items)[:count] + 1)


def _none() -> IntArray:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Split:
    """Which interactions may be learned from, and which are the answers.

    All bounds are row positions in `Interactions`, one a user. A user trains on ``offsets[u]:train_stop[u]``, less the
    interactions with items of `cold`; the validation answers are ``train_stop[u]:val_stop[u]``, the test answers
    ``val_stop[u]:test_stop[u]``. Equal bounds mean no answer, so a user without one is left out of that evaluation.

    Attributes:
        train_stop: (U,).
        val_stop: (U,).
        test_stop: (U,).
        cold: ids, ascending, of items that are struck from training and from nothing else.
    """

    train_stop: IntArray
    val_stop: IntArray
    test_stop: IntArray
    cold: IntArray = field(default_factory=_none)

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of validation and of test answers."""
        return int((self.val_stop - self.train_stop).sum()), int((self.test_stop - self.val_stop).sum())


class TrainingPart(NamedTuple):
    """What users may be learned from: user u owns ``items[first[u]:stop[u]]``, oldest first; it may be empty."""

    items: IntArray
    first: IntArray  # (U,)
    stop: IntArray  # (U,)

    def counts(self, num_items: int) -> IntArray:
        """(I+1,) how often each item is met in training; index 0, padding, is 0."""
        edges = np.zeros(len(self.items) + 1, dtype=np.int64)
        np.add.at(edges, self.first, 1)
        np.add.at(edges, self.stop, -1)
        counts = np.bincount(self.items[edges.cumsum()[:-1] > 0], minlength=num_items + 1)
        return counts.astype(np.int64)


def training_part(interactions: Interactions, split: Split) -> TrainingPart:
    """The training interactions of each user, closed up over those with cold items.

    Without cold items they are the arrays of `interactions` themselves, which are memory-mapped; else a copy.
    """
    first, stop = interactions.offsets[:-1], split.train_stop
    if not len(split.cold):
        return TrainingPart(interactions.items, first, stop)
    row = np.arange(len(interactions))
    is_cold = np.zeros(interactions.num_items + 1, dtype=np.bool_)
    is_cold[split.cold] = True
    kept = (row < np.repeat(stop, interactions.lengths)) & ~is_cold[interactions.items]  # (N,)
    before = np.concatenate([[0], np.cumsum(kept)])  # (N+1,) interactions kept before each row
    return TrainingPart(interactions.items[kept], before[first], before[interactions.offsets[1:]])


def leave_one_out(interactions: Interactions) -> Split:
    """The last item of each user is the test answer, the one before it the validation answer, the rest is training.

    At test time the validation item belongs to the history (papers of this field agree: C13). A user needs 3
    interactions to be evaluated; one with fewer is trained on and never evaluated.
    """
    stop = interactions.offsets[1:]
    held_out = np.where(interactions.lengths >= 3, 1, 0)
    return Split(train_stop=stop - 2 * held_out, val_stop=stop - held_out, test_stop=np.array(stop))
