"""Who met what, when: one row an interaction, grouped by user, oldest first, on CSR offsets.

Axis letters: U users, I items, N interactions. Item ids run 1..I; 0 is padding. Users run 0..U-1.
"""

from dataclasses import dataclass
from pathlib import Path

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
