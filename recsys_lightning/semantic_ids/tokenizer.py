"""The contract of item tokenizers: item embeddings in, semantic IDs out."""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn

from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.table import SemanticIds


class ItemTokenizer(nn.Module, ABC):
    """What turns item embeddings (B, D) into codes (B, L).

    `fit` learns in closed form what can be learned so; `losses` are minimised by gradient after it, if there are any;
    `encode` then gives the codes. The whole state is in `state_dict`.
    """

    embedding_dim: int  # D
    num_levels: int  # L
    num_codes: int  # K

    @property
    @abstractmethod
    def fitted(self) -> bool:
        """Whether `fit` has run, here or before the checkpoint that was loaded: if so, do not call it again."""

    @abstractmethod
    def fit(self, embeddings: Tensor) -> Self:
        """Learn in closed form from the whole catalogue; called once, before any gradient step, on every rank.

        Args:
            embeddings: (I, D) of real items only, no padding row.
        """

    @abstractmethod
    def losses(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Weighted terms to minimise by gradient, of embeddings (B, D); `{}` when `fit` was all there is to learn."""

    @abstractmethod
    def encode(self, embeddings: Tensor) -> Tensor:
        """Codes (B, L) int64 in 0..K-1 of embeddings (B, D), without gradient."""

    @abstractmethod
    def reconstruct(self, embeddings: Tensor) -> Tensor:
        """What the codes alone keep of embeddings (B, D), (B, D), without gradient."""


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


@torch.no_grad()
def tokenize(
    tokenizer: ItemTokenizer, embeddings: Tensor, fingerprint: str, description: str, batch_size: int = 4096
) -> SemanticIds:
    """Give every item of a catalogue its semantic ID, with the tokenizer in evaluation mode.

    Args:
        tokenizer: A fitted, trained tokenizer, on any device; its mode is as before afterwards.
        embeddings: (I+1, D), row 0 padding, on any device.
        fingerprint: Fingerprint of the embeddings, kept in the table.
        description: What the tokenizer is, in words, kept in the table.
        batch_size: Rows encoded at once.

    Returns:
        The table, on the CPU.
    """
    check_embeddings(embeddings[1:], tokenizer.embedding_dim)
    device = next((tensor.device for tensor in tokenizer.state_dict().values()), embeddings.device)
    was_training = tokenizer.training
    tokenizer.eval()
    try:
        codes = [tokenizer.encode(rows.to(device)).cpu() for rows in torch.split(embeddings[1:], batch_size)]
    finally:
        tokenizer.train(was_training)
    padding = torch.zeros(1, tokenizer.num_levels, dtype=torch.int64)
    return SemanticIds(
        codes=torch.cat([padding, *codes]),  # (I+1, L)
        num_codes=tokenizer.num_codes,
        embeddings_fingerprint=fingerprint,
        tokenizer=description,
    )
