"""The contract of item tokenizers: item embeddings in, semantic IDs out."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import polars as pl
import torch
from torch import Tensor, nn

from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.table import SemanticIds

# Rows that are encoded at once: bounds memory on catalogues of millions.
_ROWS = 8192


class ItemTokenizer(nn.Module, ABC):
    """What turns items into codes: their embeddings (B, D) or, where it says so, what the catalogue says of them.

    `fit` learns in closed form what can be learned so; `losses` are minimised by gradient after it, if there are any;
    `assign` then gives the codes of a catalogue. The whole state is in `state_dict`.
    """

    embedding_dim: int  # D
    num_levels: int  # L
    num_codes: int  # K

    @property
    @abstractmethod
    def fitted(self) -> bool:
        """Whether `fit` has run, here or before the checkpoint that was loaded: if so, do not call it again."""

    @abstractmethod
    def fit(self, embeddings: Tensor, fields: pl.DataFrame | None = None) -> Self:
        """Learn in closed form from the whole catalogue; called once, before any gradient step, on every rank.

        Args:
            embeddings: (I, D) of real items only, no padding row.
            fields: of the same items, a row each, as `Catalog.fields`: raw id and text fields. None where a tokenizer
                is used outside a catalogue.
        """

    def losses(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Weighted terms to minimise by gradient, of embeddings (B, D); `{}` when `fit` was all there is to learn."""
        return {}

    @abstractmethod
    def encode(self, embeddings: Tensor) -> Tensor:
        """Codes (B, L) int64 in 0..K-1 of embeddings (B, D), without gradient, each row by itself."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """What codes (B, L) stand for, (B, D), without gradient: an estimate of `target`."""

    def target(self, embeddings: Tensor) -> Tensor:
        """What `decode` is an estimate of, (B, D): the embeddings (B, D), scaled where the tokenizer scales them."""
        return embeddings

    def latents(self, embeddings: Tensor) -> Tensor:
        """What codewords are sought for, (B, width of a codeword): `target`, unless an encoder stands before them."""
        return self.target(embeddings)

    @torch.no_grad()
    def reconstruct(self, embeddings: Tensor) -> Tensor:
        """What the codes alone keep of embeddings (B, D), (B, D), without gradient; an estimate of `target`."""
        return self.decode(self.encode(embeddings))

    @torch.no_grad()
    def assign(self, embeddings: Tensor, fields: pl.DataFrame | None = None) -> Tensor:
        """Codes (I, L) on the CPU of a whole catalogue: embeddings (I, D) and fields as of `fit`.

        By default each item's nearest; a tokenizer that balances items over codes, or that reads fields, has its own.
        """
        return torch.cat([self.encode(rows.to(self.device)).cpu() for rows in torch.split(embeddings, _ROWS)])

    def last_distances(self, embeddings: Tensor, codes: Tensor) -> Tensor:
        """Squared distances (B, K) that each code of the last level would leave, given the codes (B, L) before it.

        Args:
            embeddings: (B, D).
            codes: (B, L), of which the last is not read.

        Raises:
            InputError: this tokenizer's last level has no distances.
        """
        raise InputError(
            f"{type(self).__name__} has no distances to the codes of its last level, which collisions by 'sinkhorn' "
            "and 'reassign' need; set collisions to 'none' or 'extra_token'"
        )

    @property
    def device(self) -> torch.device:
        """Where its state lies; the CPU if it has none."""
        return next((value.device for value in self.state_dict().values() if isinstance(value, Tensor)), _CPU)


_CPU = torch.device("cpu")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each part has its own mode back afterwards, also a part that is never trained."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def check_embeddings(embeddings: Tensor, embedding_dim: int) -> None:
    """Refuse embeddings a tokenizer cannot be fitted on.

    Raises:
        InputError: Not (I, D) with D = `embedding_dim`, no rows, or values that are not finite.
    """
    if embeddings.ndim != 2 or len(embeddings) == 0:
        raise InputError(f"item embeddings need shape (I, D) with at least one item, got {tuple(embeddings.shape)}")
    if embeddings.shape[1] != embedding_dim:
        raise InputError(
            f"item embeddings have width {embeddings.shape[1]} but the tokenizer has embedding_dim={embedding_dim}; "
            f"set embedding_dim to {embeddings.shape[1]}"
        )
    broken = (~embeddings.isfinite().all(-1)).nonzero()  # (N, 1)
    if len(broken):
        raise InputError(
            f"{len(broken)} of {len(embeddings)} item embeddings hold NaN or infinity, first in row {int(broken[0])}; "
            "make the embeddings anew"
        )


def tokenize(
    tokenizer: ItemTokenizer,
    embeddings: Tensor,
    fingerprint: str,
    description: str,
    fields: pl.DataFrame | None = None,
) -> SemanticIds:
    """Give every item of a catalogue its semantic ID, with the tokenizer in evaluation mode.

    Args:
        tokenizer: A fitted, trained tokenizer, on any device; its mode is as before afterwards.
        embeddings: (I+1, D), row 0 padding, on any device.
        fingerprint: Fingerprint of the embeddings, kept in the table.
        description: What the tokenizer is, in words, kept in the table.
        fields: of the items, I rows, as `Catalog.fields`; None where the tokenizer reads none.

    Returns:
        The table, on the CPU.
    """
    check_embeddings(embeddings[1:], tokenizer.embedding_dim)
    with evaluating(tokenizer):
        codes = tokenizer.assign(embeddings[1:], fields)  # (I, L)
    padding = torch.zeros(1, tokenizer.num_levels, dtype=torch.int64)
    return SemanticIds(
        codes=torch.cat([padding, codes]),  # (I+1, L)
        num_codes=tokenizer.num_codes,
        embeddings_fingerprint=fingerprint,
        tokenizer=description,
        item_ids=None if fields is None else tuple(fields.get_column("item_id").to_list()),
    )


@torch.no_grad()
def rebuilt(tokenizer: ItemTokenizer, embeddings: Tensor, codes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What codes stand for and what a tokenizer makes of them, bit by bit: targets and estimates, both (n, D).

    Args:
        tokenizer: In evaluation mode.
        embeddings: (I, D), without a padding row.
        codes: (I, L) of the same items.
    """
    for rows, own in zip(torch.split(embeddings, _ROWS), torch.split(codes, _ROWS), strict=True):
        yield tokenizer.target(rows.to(tokenizer.device)), tokenizer.decode(own.to(tokenizer.device))
