"""What is known of the items: raw ids, text fields, how often each was met in training, text embeddings."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recsys_lightning.data.interactions import IntArray
from recsys_lightning.data.text import ItemEmbeddings
from recsys_lightning.errors import InputError


@dataclass(frozen=True)
class Catalog:
    """I items, numbered 1..I; id 0 is padding.

    Attributes:
        fields: I rows; column ``item_id`` (raw id) and one String column a text field, null where unknown. Item i is
            row i-1.
        train_counts: (I+1,) interactions of each item in the training split; index 0 is 0.
        text: the item embeddings, if the data set has text and an encoder was named.
    """

    fields: pl.DataFrame
    train_counts: IntArray
    text: ItemEmbeddings | None = None

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

    def _text(self) -> ItemEmbeddings:
        if self.text is None:
            raise InputError(
                "this model needs item text embeddings: name an encoder with --data.encoder, e.g. TfidfSVD"
            )
        return self.text
