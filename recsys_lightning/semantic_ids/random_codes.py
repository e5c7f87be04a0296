"""Random codes: the control that semantic IDs must beat to be called semantic."""

import hashlib
from collections.abc import Sequence
from typing import Self

import polars as pl
import torch
from torch import Tensor

from recsys_lightning.errors import InputError
from recsys_lightning.nn.codebook import least_squares_codebooks
from recsys_lightning.nn.quantize import residual_decode
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer, check_embeddings


class RandomCodes(ItemTokenizer):
    """Codes that say nothing of an item but which one it is.

    A code is a hash (BLAKE2b) of seed, level and raw item id, modulo K: an item has the same codes in every catalogue,
    on every machine. Embeddings are not read, so `encode` is refused; `assign` reads the column ``item_id``.

    `decode` is a sum of codewords, as in a residual quantizer, that `fit` chooses for these codes by least squares:
    what it tells of an item is chance, some L K / I of the spread of the embeddings.

    Args:
        embedding_dim: Width D of the item embeddings.
        num_levels: Levels L.
        num_codes: Codes K a level.
        seed: Another seed, other codes.

    Raises:
        InputError: An argument is out of its range.
    """

    codebooks: Tensor  # (L, K, D)
    was_fitted: Tensor  # () bool

    def __init__(self, embedding_dim: int, num_levels: int = 3, num_codes: int = 32, seed: int = 0) -> None:
        super().__init__()
        if min(embedding_dim, num_levels) < 1 or num_codes < 2:
            raise InputError(
                "RandomCodes needs embedding_dim and num_levels of 1 or more and num_codes of 2 or more, "
                f"got {embedding_dim=} {num_levels=} {num_codes=}"
            )
        self.embedding_dim = embedding_dim
        self.num_levels = num_levels
        self.num_codes = num_codes
        self.seed = seed
        self.register_buffer("codebooks", torch.zeros(num_levels, num_codes, embedding_dim))
        self.register_buffer("was_fitted", torch.tensor(False))

    @property
    def fitted(self) -> bool:
        """Whether the codewords of `decode` have been learned; the codes need no learning."""
        return bool(self.was_fitted)

    @torch.no_grad()
    def fit(self, embeddings: Tensor, fields: pl.DataFrame | None = None) -> Self:
        """Learn the codewords of `decode` from embeddings (I, D) and the raw ids in `fields`.

        Raises:
            InputError: Embeddings of another width, or not finite; or no fields.
        """
        check_embeddings(embeddings, self.embedding_dim)
        codes = self.assign(embeddings, fields)  # (I, L)
        self.codebooks.copy_(least_squares_codebooks(embeddings, codes, self.num_codes))
        self.was_fitted.fill_(True)
        return self

    def assign(self, embeddings: Tensor, fields: pl.DataFrame | None = None) -> Tensor:
        """Codes (I, L) of the items whose raw ids stand in `fields`; embeddings (I, D) are not read.

        Raises:
            InputError: No fields.
        """
        return torch.tensor([self._codes(item) for item in raw_ids(fields, len(embeddings), self)])

    def encode(self, embeddings: Tensor) -> Tensor:
        """Refused: an embedding does not say which item it is of.

        Raises:
            InputError: Always.
        """
        raise no_codes_of_embeddings(self)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The sum of the codewords that codes (B, L) name, (B, D)."""
        return residual_decode(codes.to(self.device), self.codebooks)

    def _codes(self, item: str) -> list[int]:
        named = (f"{self.seed} {level} {item}".encode() for level in range(self.num_levels))
        return [int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) % self.num_codes for name in named]


def raw_ids(fields: pl.DataFrame | None, num_items: int, tokenizer: ItemTokenizer) -> Sequence[str]:
    """The raw ids of the items, from the fields that a tokenizer is given.

    Raises:
        InputError: No fields, or not a row an item.
    """
    name = type(tokenizer).__name__
    if fields is None:
        raise InputError(f"{name} reads the fields of the items, and none are given: call it with Catalog.fields")
    if len(fields) != num_items:
        raise InputError(f"{name} was given {num_items} embeddings but the fields of {len(fields)} items")
    ids: list[str] = fields.get_column("item_id").to_list()
    return ids


def no_codes_of_embeddings(tokenizer: ItemTokenizer) -> InputError:
    """What is raised by `encode` of a tokenizer that reads fields."""
    name = type(tokenizer).__name__
    return InputError(f"{name} gives codes by what is known of an item, not by its embedding: use assign, with fields")
