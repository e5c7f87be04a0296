"""What is known of the items: raw ids, text fields, how often each was met in training, text embeddings."""

import difflib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recsys_lightning.data.interactions import IntArray
from recsys_lightning.data.text import ItemEmbeddings
from recsys_lightning.data.users import UserFeatures
from recsys_lightning.errors import InputError

LIST_SEPARATOR = "; "  # between the values of a field that is a list
PATH_SEPARATOR = " > "  # between a category and the one within it


@dataclass(frozen=True)
class ItemCategories:
    """Which values of one field each item has.

    Attributes:
        values: the values, the one of most items first; ``values[i]`` has id i+1.
        item: (I+1, V) ids of each item's values in ascending order, padded with 0 on the right; row 0 is padding.
    """

    values: tuple[str, ...]
    item: Tensor


@dataclass(frozen=True)
class Catalog:
    """I items, numbered 1..I; id 0 is padding.

    Attributes:
        fields: I rows; column ``item_id`` (raw id) and one String column a text field, null where unknown. Item i is
            row i-1.
        train_counts: (I+1,) interactions of each item in the training split; index 0 is 0.
        text: the item embeddings, if the data set has text and an encoder was named.
        user_features: of all users, if the source has them; batches carry the codes of theirs.
    """

    fields: pl.DataFrame
    train_counts: IntArray
    text: ItemEmbeddings | None = None
    user_features: UserFeatures | None = None

    def __post_init__(self) -> None:
        if len(self.train_counts) != len(self.fields) + 1:
            raise ValueError(f"{len(self.fields)} items but {len(self.train_counts)} counts (padding included)")
        if self.text is not None and len(self.text.vectors) != len(self.fields) + 1:
            raise ValueError(f"{len(self.fields)} items but {len(self.text.vectors)} embeddings (padding included)")

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.fields)

    @cached_property
    def raw_ids(self) -> list[str]:
        """The item ids of the raw files; item i is at index i-1."""
        return self.fields.get_column("item_id").to_list()

    def text_embeddings(self) -> Tensor:
        """(I+1, D) float32 copy of the item embeddings, row 0 zeros.

        Raises:
            InputError: the data was prepared without a text encoder.
        """
        return torch.from_numpy(np.array(self._text().vectors, dtype=np.float32))

    @property
    def text_width(self) -> int:
        """D of the item embeddings."""
        return int(self._text().vectors.shape[1])

    @property
    def text_fingerprint(self) -> str:
        """Fingerprint of the item embeddings: semantic IDs made from other embeddings are refused by it."""
        return self._text().fingerprint

    def categorical(self, name: str, min_count: int = 2) -> ItemCategories:
        """The values of a text field as ids, such as brands and categories.

        A field that is a list, ``A; B``, has several values, and a path such as ``Beauty > Hair > Combs`` stands for
        each category on it: ``Beauty``, ``Beauty > Hair`` and itself. Equal counts go by alphabet.

        Args:
            name: of the field.
            min_count: items that must have a value; a rarer one counts as none. By default 2: a value of one item says
                nothing that the item itself does not.

        Raises:
            InputError: there is no such field, or no value of it is frequent enough.
        """
        known = [field for field in self.fields.columns if field != "item_id"]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"items have no field {name!r}; {hint}there are {', '.join(map(repr, known)) or 'none'}")
        rows = [_values(text) for text in self.fields.get_column(name).to_list()]  # I sets
        counts = Counter(value for row in rows for value in row)
        kept = sorted((value for value in counts if counts[value] >= min_count), key=lambda v: (-counts[v], v))
        if not kept:
            raise InputError(f"no value of the items' field {name!r} is shared by {min_count} items; lower min_count")
        number = {value: position for position, value in enumerate(kept, 1)}
        ids = [sorted(number[value] for value in row if value in number) for row in rows]
        item = np.zeros((self.num_items + 1, max(map(len, ids))), dtype=np.int64)  # (I+1, V)
        for position, row in enumerate(ids, 1):
            item[position, : len(row)] = row
        return ItemCategories(tuple(kept), torch.from_numpy(item))

    def _text(self) -> ItemEmbeddings:
        if self.text is None:
            raise InputError(
                "this model needs item text embeddings: name an encoder with --data.encoder, e.g. TfidfSVD"
            )
        return self.text


def _values(text: str | None) -> set[str]:
    """The values that a field of one item holds, with all categories on a path."""
    found: set[str] = set()
    for value in (text or "").split(LIST_SEPARATOR):
        parts = [" ".join(part.split()) for part in value.split(PATH_SEPARATOR)]
        path = [part for part in parts if part]
        found |= {PATH_SEPARATOR.join(path[:depth]) for depth in range(1, len(path) + 1)}
    return found
