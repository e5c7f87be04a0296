"""Residual vector quantization, trained on the embeddings themselves: an RQ-VAE without the autoencoder."""

from typing import Literal, Self

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_lightning.distributed import row_weight
from recsys_lightning.nn.quantize import ResidualQuantizer, residual_last_distances
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer, check_embeddings


class ResidualVQ(ItemTokenizer):
    """A tokenizer whose codebooks are learned batch by batch, where `ResidualKMeans` sees all items at once.

    The quantizer of `RQVAE` with nothing around it. `fit` sets the codebooks by a few iterations of residual k-means;
    then with r_1 the embedding and codes, e and r as in `ResidualQuantizer`::

        losses: quantization = mean over rows of sum_m |r_m - e_m|^2

    There is no commitment term: it moves what is quantized, and embeddings stay as they are.

    Args:
        embedding_dim: Width D of the item embeddings.
        num_levels: Levels L.
        num_codes: Codes K a level.
        codebook_update: Codebooks learn by the loss, or by moving averages of the batches (``"ema"``): then there is no
            loss to minimise and no optimizer.
        ema_decay: Memory of the moving averages, per training step.
        dead_code_threshold: In training, a code used less than this part of the fair share 1/K is set to a random
            residual of the batch; 0 turns it off.
        normalize: Scale each embedding to length 1 first, so that nearness is cosine.
        kmeans_iterations: Most iterations of the k-means that sets the first codebooks.
        seed: Seed of that k-means.

    Raises:
        InputError: An argument is out of its range.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_levels: int = 3,
        num_codes: int = 32,
        codebook_update: Literal["ema", "gradient"] = "gradient",
        ema_decay: float = 0.99,
        dead_code_threshold: float = 0.2,
        normalize: bool = True,
        kmeans_iterations: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.num_levels = num_levels
        self.num_codes = num_codes
        self.normalize = normalize
        self.kmeans_iterations = kmeans_iterations
        self.seed = seed
        self.quantizer = ResidualQuantizer(
            embedding_dim,
            num_levels,
            num_codes,
            commitment=0.0,
            codebook_update=codebook_update,
            ema_decay=ema_decay,
            dead_code_threshold=dead_code_threshold,
        )

    @property
    def fitted(self) -> bool:
        """Whether the codebooks have been initialised from data."""
        return bool(self.quantizer.initialised)

    @torch.no_grad()
    def fit(self, embeddings: Tensor, fields: pl.DataFrame | None = None) -> Self:
        """Set the first codebooks by residual k-means on embeddings (I, D); `fields` are not read.

        Raises:
            InputError: Embeddings of another width, or not finite.
        """
        check_embeddings(embeddings, self.embedding_dim)
        self.quantizer.init_from_data(self.target(embeddings), self.kmeans_iterations, self.seed)
        return self

    def losses(self, embeddings: Tensor) -> dict[str, Tensor]:
        """The weighted term `quantization` (), of embeddings (B, D); with moving averages `{}`.

        In training mode codebook statistics are updated, and with moving averages the codebooks themselves. On several
        processes the mean over them is the loss of all their rows.
        """
        loss = row_weight(len(embeddings), embeddings.device) * self.quantizer(self.target(embeddings)).loss
        return {"quantization": loss} if self.quantizer.codebook_update == "gradient" else {}

    @torch.no_grad()
    def encode(self, embeddings: Tensor) -> Tensor:
        """Codes (B, L) of embeddings (B, D)."""
        return self.quantizer.encode(self.target(embeddings))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The sum of the codewords that codes (B, L) name, (B, D)."""
        return self.quantizer.decode(codes.to(self.device))

    def target(self, embeddings: Tensor) -> Tensor:
        """The embeddings (B, D), scaled to length 1 where `normalize` is set."""
        rows = embeddings.to(self.quantizer.codebooks)  # (B, D)
        return F.normalize(rows, dim=-1) if self.normalize else rows

    @torch.no_grad()
    def last_distances(self, embeddings: Tensor, codes: Tensor) -> Tensor:
        """Squared distances (B, K) of what the levels before the last leave to its codewords."""
        return residual_last_distances(self.target(embeddings), codes, self.quantizer.codebooks)
