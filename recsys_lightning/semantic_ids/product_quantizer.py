"""Product quantization (PQ) and its rotated form (OPQ) as semantic IDs: each code names a part of the embedding."""

from typing import Self

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_lightning.errors import InputError
from recsys_lightning.nn.codebook import nearest_code
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer, check_embeddings


class ProductQuantizer(ItemTokenizer):
    """A tokenizer whose codes stand side by side: code l is the nearest centre of the l-th part of the embedding.

    PQ (Jegou et al., TPAMI 2011) cuts an embedding into L equal parts; OPQ (Ge et al., TPAMI 2014) rotates it first, by
    the rotation with which that loses least. FAISS learns both. No code is coarser than another, as in VQ-Rec
    (arXiv:2210.12316), so a prefix of the ID means no more than its own parts::

        y = rotation @ embedding,   code_l = argmin_k |y_l - e_l[k]|^2

    A width that L does not divide is filled up with zeros, which change no distance.

    Args:
        embedding_dim: Width D of the item embeddings.
        num_levels: Parts L.
        num_codes: Codes K a part, a power of two: FAISS counts in bits.
        opq: Learn a rotation.
        num_iterations: k-means iterations, and turns of OPQ.
        normalize: Scale each embedding to length 1 first, so that nearness is cosine.
        seed: Seed of the k-means.

    Raises:
        InputError: An argument is out of its range.
    """

    codebooks: Tensor  # (L, K, W), W the width of a part
    rotation: Tensor  # (L * W, L * W)
    was_fitted: Tensor  # () bool

    def __init__(
        self,
        embedding_dim: int,
        num_levels: int = 3,
        num_codes: int = 32,
        opq: bool = False,
        num_iterations: int = 25,
        normalize: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(embedding_dim, num_levels, num_iterations) < 1 or num_levels > embedding_dim:
            raise InputError(
                "ProductQuantizer needs embedding_dim, num_levels and num_iterations of 1 or more and no more levels "
                f"than dimensions, got {embedding_dim=} {num_levels=} {num_iterations=}"
            )
        if num_codes < 2 or num_codes & (num_codes - 1):
            below = 2 ** max(num_codes.bit_length() - 1, 1) if num_codes > 0 else 2
            raise InputError(f"ProductQuantizer needs a power of two as num_codes, got {num_codes}; take {below}")
        self.embedding_dim = embedding_dim
        self.num_levels = num_levels
        self.num_codes = num_codes
        self.opq = opq
        self.num_iterations = num_iterations
        self.normalize = normalize
        self.seed = seed
        part = -(-embedding_dim // num_levels)  # W
        self.register_buffer("codebooks", torch.zeros(num_levels, num_codes, part))
        self.register_buffer("rotation", torch.eye(num_levels * part))
        self.register_buffer("was_fitted", torch.tensor(False))

    @property
    def fitted(self) -> bool:
        """Whether the codebooks have been learned."""
        return bool(self.was_fitted)

    @torch.no_grad()
    def fit(self, embeddings: Tensor, fields: pl.DataFrame | None = None) -> Self:
        """Learn codebooks and rotation from embeddings (I, D) of real items; `fields` are not read.

        Fewer items than codes are repeated: FAISS wants a row for each centre.

        Raises:
            InputError: Embeddings of another width, or not finite; or FAISS is missing.
        """
        check_embeddings(embeddings, self.embedding_dim)
        # Where it is asked for only: it may be missing.
        from recsys_lightning.retrieval.faiss_clustering import product_codebooks

        rows = self._padded(embeddings)  # (I, L * W)
        rows = rows.repeat(-(-self.num_codes // len(rows)), 1)  # (N, L * W), N >= K
        learned = product_codebooks(rows, self.num_levels, self.num_codes, self.num_iterations, self.seed, self.opq)
        self.codebooks.copy_(learned.codebooks)
        self.rotation.copy_(learned.rotation)
        self.was_fitted.fill_(True)
        return self

    @torch.no_grad()
    def encode(self, embeddings: Tensor) -> Tensor:
        """Codes (B, L) of embeddings (B, D).

        Raises:
            RuntimeError: Called before `fit`.
        """
        if not self.fitted:
            raise RuntimeError("ProductQuantizer.encode was called before fit: there are no codebooks yet")
        return torch.stack(
            [nearest_code(part, book) for part, book in zip(self._parts(embeddings), self.codebooks, strict=True)], -1
        )

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The centres that codes (B, L) name, side by side and rotated back, (B, D)."""
        levels = torch.arange(self.num_levels, device=self.device)
        parts = self.codebooks[levels, codes.to(self.device)]  # (B, L, W)
        return (parts.flatten(1) @ self.rotation)[:, : self.embedding_dim]  # (B, D)

    def target(self, embeddings: Tensor) -> Tensor:
        """The embeddings (B, D), scaled to length 1 where `normalize` is set."""
        rows = embeddings.to(self.codebooks)  # (B, D)
        return F.normalize(rows, dim=-1) if self.normalize else rows

    @torch.no_grad()
    def last_distances(self, embeddings: Tensor, codes: Tensor) -> Tensor:
        """Squared distances (B, K) that each centre of the last part would leave, those of the other parts included."""
        parts = self._parts(embeddings)  # L times (B, W)
        own = [book[code] for book, code in zip(self.codebooks, codes.to(self.device).unbind(-1), strict=True)]
        before = torch.stack([(part - word).square().sum(-1) for part, word in zip(parts, own, strict=True)])  # (L, B)
        return before[:-1].sum(0)[:, None] + torch.cdist(parts[-1], self.codebooks[-1]).square()

    def _padded(self, embeddings: Tensor) -> Tensor:
        """The targets of embeddings (B, D), filled up with zeros to (B, L * W)."""
        return F.pad(self.target(embeddings), (0, len(self.rotation) - self.embedding_dim))

    def _parts(self, embeddings: Tensor) -> tuple[Tensor, ...]:
        """The parts of embeddings (B, D), rotated: L times (B, W)."""
        return (self._padded(embeddings) @ self.rotation.T).chunk(self.num_levels, -1)
