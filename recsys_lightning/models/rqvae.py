"""RQ-VAE: an autoencoder whose bottleneck is a residual quantizer, the tokenizer of TIGER and COBRA.

TIGER (arXiv:2305.05065) section 3.1; COBRA (arXiv:2503.02453) section 3.1.1.
"""

from collections.abc import Sequence
from typing import Literal, Self, get_args

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_lightning.distributed import row_weight
from recsys_lightning.errors import InputError
from recsys_lightning.nn.mlp import MLP
from recsys_lightning.nn.quantize import ResidualQuantizer, residual_last_distances
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer, check_embeddings

RQVAEEstimator = Literal["straight_through", "rotation", "gumbel"]

# Rows the encoder takes at once in `fit`: bounds memory on catalogues of millions.
_FIT_BATCH = 8192


class RQVAE(ItemTokenizer):
    """A tokenizer that learns a latent space in which few codewords rebuild the item embedding.

    TIGER (arXiv:2305.05065) section 3.1, equation for L(x)::

        z = encoder(x),   z_hat = sum_m e_m (residual quantization of z),   x_hat = decoder(z_hat)
        losses: reconstruction = reconstruction_weight * mean over rows of |x - x_hat|^2
                quantization   = mean over rows of sum_m |sg(r_m) - e_m|^2 + commitment * |r_m - sg(e_m)|^2

    All squared norms are sums over the width, as printed, not means. With ``codebook_update="ema"``, our default,
    moving averages stand in for the first quantization term. COBRA prints 3 levels of 32 codes and leaves the rest
    open; widths and `commitment` are TIGER's.

    Args:
        embedding_dim: Width D of the item embeddings.
        hidden: Widths of the encoder's hidden layers; the decoder has them in reverse.
        latent_dim: Width of the quantized space.
        num_levels: Levels L.
        num_codes: Codes K a level.
        commitment: Weight of the commitment term.
        codebook_update: Codebooks learn by moving averages (``"ema"``) or by the codebook loss (``"gradient"``).
        ema_decay: Memory of the moving averages, per training step.
        dead_code_threshold: In training, a code used less than this part of the fair share 1/K is set to a random
            residual of the batch; 0 turns it off.
        dropout: Dropout in encoder and decoder.
        normalize: Scale each embedding to length 1 first; the scaled one is then also what is rebuilt.
        reconstruction_weight: Weight of the reconstruction term.
        seed: Seed of the k-means that sets the first codebooks.
        estimator: How the reconstruction's gradient passes the quantizer to the encoder: as it is, turned by the
            rotation trick, or through the weights of a random mixture of codewords (`ResidualQuantizer`). With
            ``codebook_update="gradient"`` the last two also pass it to the codebooks.
        temperature: Of the mixture of ``estimator="gumbel"``.
        sinkhorn: Epsilon of a Sinkhorn-balanced assignment of the last level in training; LETTER: 0.003. None: nearest.
        sinkhorn_iterations: Scalings of that assignment.

    Raises:
        InputError: An argument is out of its range.
    """

    def __init__(
        self,
        embedding_dim: int,
        hidden: Sequence[int] = (512, 256, 128),
        latent_dim: int = 32,
        num_levels: int = 3,
        num_codes: int = 32,
        commitment: float = 0.25,
        codebook_update: Literal["ema", "gradient"] = "ema",
        ema_decay: float = 0.99,
        dead_code_threshold: float = 0.2,
        dropout: float = 0.0,
        normalize: bool = False,
        reconstruction_weight: float = 1.0,
        seed: int = 0,
        estimator: RQVAEEstimator = "straight_through",
        temperature: float = 0.2,
        sinkhorn: float | None = None,
        sinkhorn_iterations: int = 100,
    ) -> None:
        super().__init__()
        if estimator not in get_args(RQVAEEstimator):
            raise InputError(
                f"estimator of an RQVAE must be one of {', '.join(get_args(RQVAEEstimator))}, got {estimator!r}: the "
                "encoder learns by the reconstruction's gradient, and the codebooks by the quantization term or by "
                "moving averages, while 'gather' ways send it to the codebooks"
            )
        if reconstruction_weight <= 0:
            raise InputError(f"reconstruction_weight must be above 0, got {reconstruction_weight}")
        self.embedding_dim = embedding_dim
        self.num_levels = num_levels
        self.num_codes = num_codes
        self.normalize = normalize
        self.reconstruction_weight = reconstruction_weight
        self.seed = seed
        self.encoder = MLP([embedding_dim, *hidden, latent_dim], dropout)
        self.quantizer = ResidualQuantizer(
            latent_dim,
            num_levels,
            num_codes,
            commitment,
            codebook_update,
            ema_decay,
            dead_code_threshold,
            estimator,
            temperature=temperature,
            sinkhorn=sinkhorn,
            sinkhorn_iterations=sinkhorn_iterations,
        )
        self.decoder = MLP([latent_dim, *reversed(hidden), embedding_dim], dropout)

    @property
    def fitted(self) -> bool:
        """Whether the codebooks have been initialised from data."""
        return bool(self.quantizer.initialised)

    @torch.no_grad()
    def fit(self, embeddings: Tensor, fields: pl.DataFrame | None = None) -> Self:
        """Set the codebooks by residual k-means on the encoder's outputs for embeddings (I, D); `fields` are not read.

        Raises:
            InputError: Embeddings of another width, or not finite.
        """
        check_embeddings(embeddings, self.embedding_dim)
        was_training = self.training
        self.eval()
        latents = [self.encoder(self.target(rows)) for rows in torch.split(embeddings, _FIT_BATCH)]
        self.train(was_training)
        self.quantizer.init_from_data(torch.cat(latents), seed=self.seed)
        return self

    def losses(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Weighted loss terms of embeddings (B, D): `reconstruction` and `quantization`, each ().

        On several processes the mean over them is the loss of all their rows.
        """
        x = self.target(embeddings)  # (B, D)
        quantized = self.quantizer(self.encoder(x))
        error = (self.decoder(quantized.vectors) - x).square().sum(-1).mean()  # ()
        share = row_weight(len(x), x.device)
        return {"reconstruction": share * self.reconstruction_weight * error, "quantization": share * quantized.loss}

    @torch.no_grad()
    def encode(self, embeddings: Tensor) -> Tensor:
        """Codes (B, L) of embeddings (B, D). In training mode dropout acts on them: call `eval()` first."""
        return self.quantizer.encode(self.encoder(self.target(embeddings)))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """What the decoder makes of codes (B, L), (B, D)."""
        rebuilt: Tensor = self.decoder(self.quantizer.decode(codes.to(self.device)))  # (B, D)
        return rebuilt

    def target(self, embeddings: Tensor) -> Tensor:
        """The embeddings (B, D), scaled to length 1 where `normalize` is set."""
        rows = embeddings.to(next(self.encoder.parameters()))  # (B, D)
        return F.normalize(rows, dim=-1) if self.normalize else rows

    @torch.no_grad()
    def latents(self, embeddings: Tensor) -> Tensor:
        """What the encoder makes of embeddings (B, D), (B, latent)."""
        latents: Tensor = self.encoder(self.target(embeddings))
        return latents

    @torch.no_grad()
    def last_distances(self, embeddings: Tensor, codes: Tensor) -> Tensor:
        """Squared distances (B, K), in the latent space, of what the levels before the last leave to its codewords."""
        return residual_last_distances(self.latents(embeddings), codes, self.quantizer.codebooks)
