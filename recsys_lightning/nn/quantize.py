"""Residual quantization: write a vector as a sum of codewords, coarse to fine.

TIGER (arXiv:2305.05065) section 3.1, used by COBRA (arXiv:2503.02453) section 3.1.1 and, trained with the recommender,
by SPARC (arXiv:2508.09090) section 3.2.
Shapes: B rows, D width, L levels, K codes a level.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys_lightning.errors import InputError
from recsys_lightning.nn.codebook import kmeans_codebook, nearest_code
from recsys_lightning.nn.estimators import Estimator, estimate, gumbel_words, squared_distances
from recsys_lightning.nn.sinkhorn import balanced_codes, check_sinkhorn

# A code whose EMA usage is below this has no mean worth dividing for: its codeword stays where it is.
_SMALLEST_USAGE = 1e-12


class Quantized(NamedTuple):
    """What a residual quantizer says of a batch."""

    vectors: Tensor  # (B, D) sum of the chosen codewords, with the gradient of the quantizer's estimator
    codes: Tensor  # (B, L) int64, the chosen code of each level: the semantic ID
    loss: Tensor  # () commitment term, plus the codebook term where codebooks learn by gradient
    words: Tensor  # (B, L, D) chosen codewords, with a gradient to the codebooks where they learn by gradient


def residual_encode(rows: Tensor, codebooks: Tensor) -> Tensor:
    """Codes of the greedy residual quantization: rows (B, D), codebooks (L, K, D) -> (B, L) int64."""
    residual, codes = rows, []
    for codebook in codebooks.unbind(0):  # (K, D)
        codes.append(nearest_code(residual, codebook))
        residual = residual - codebook[codes[-1]]  # (B, D)
    return torch.stack(codes, -1)  # (B, L)


def residual_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Sum of the named codewords: codes (..., L), codebooks (L, K, D) -> (..., D)."""
    levels = torch.arange(len(codebooks), device=codes.device)  # (L,)
    return codebooks[levels, codes].sum(-2)  # (..., D)


def residual_last_distances(rows: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    """Squared distances (B, K) to the last level's codewords of what the levels before it leave of rows (B, D).

    Args:
        rows: (B, D).
        codes: (B, L), of which the last is not read.
        codebooks: (L, K, D).
    """
    before = residual_decode(codes[:, :-1].to(codebooks.device), codebooks[:-1])  # (B, D)
    return torch.cdist(rows - before, codebooks[-1]).square()


def residual_kmeans(
    rows: Tensor, num_levels: int, num_codes: int, num_iterations: int = 50, num_starts: int = 1, seed: int = 0
) -> Tensor:
    """Codebooks learned level by level, each by k-means on what the levels before left: rows (N, D) -> (L, K, D)."""
    residual, codebooks = rows.detach(), []
    for _ in range(num_levels):
        codebooks.append(kmeans_codebook(residual, num_codes, num_iterations, num_starts, seed))
        residual = residual - codebooks[-1][nearest_code(residual, codebooks[-1])]  # (N, D)
    return torch.stack(codebooks)  # (L, K, D)


class ResidualQuantizer(nn.Module):
    """A stack of codebooks in which each level quantizes what the levels before it left over.

    TIGER (arXiv:2305.05065) section 3.1. With r_1 = x, for m = 1..L::

        c_m = argmin_k |r_m - e_m[k]|^2,   e_m = e_m[c_m],   r_(m+1) = r_m - e_m
        vectors = sum_m e_m
        loss = mean over rows of sum_m  |sg(r_m) - e_m|^2 + commitment * |r_m - sg(e_m)|^2

    The squared norms are sums over D, as printed. `r_m` carries a gradient to x alone: earlier codewords are held.

    That is ``loss_form="vq"``. SPARC's text prints another form (choice S3), here ``loss_form="paper"``, in which
    `commitment` weighs the codebook term and the first term moves input and codebooks alike::

        loss = mean over rows of |x - sum_m e_m|^2 + commitment * sum_m |sg(r_m) - e_m|^2

    `estimator` says who gets the gradient of what is computed with `vectors` (`recsys_lightning.nn.estimators`);
    what is computed with `words` moves the codebooks, in gradient mode, and never the input. ``"gumbel"`` is a way of
    its own: in training e_m is a random mixture of codewords (`recsys_lightning.nn.estimators.gumbel_words`), through
    whose weights all gradients reach the input, those of `words` too; `codes` are still the nearest. In evaluation it
    is the nearest codeword, as ever.

    With `sinkhorn` the codes of the last level are in training those of a Sinkhorn-balanced assignment of the batch
    (`recsys_lightning.nn.sinkhorn`), as LETTER (arXiv:2405.07314) and MiniOneRec have it: the level that is to tell the
    items of a prefix apart shall use all its codes. In evaluation, and in `encode`, they are the nearest.

    Codebooks learn in one of two ways:

    * ``"ema"``: moving averages of the residuals that chose a code (van den Oord et al., arXiv:1711.00937, appendix
      A.1), updated in each training-mode forward; the first loss term is left out. With n_k of the batch's B rows
      choosing code k and g = `ema_decay`::

          usage_k = g usage_k + (1 - g) n_k / B
          sum_k   = g sum_k   + (1 - g) (sum of those n_k residuals) / B
          e[k]    = sum_k / usage_k

      Dividing by B leaves e[k] as it is in the paper and makes `usage` a share of rows, whatever the batch size.
    * ``"gradient"``: the first loss term, by the optimizer.

    When `torch.distributed` is initialised the batch is the union of all ranks' batches and fresh codewords come from
    rank 0, so that codebooks stay equal on all ranks. A Sinkhorn assignment balances the batch of each rank by itself.

    Args:
        dim: Width D of the vectors.
        num_levels: Levels L.
        num_codes: Codes K a level.
        commitment: Weight of the commitment term (TIGER: 0.25); with ``loss_form="paper"`` of the codebook term.
        codebook_update: How codebooks learn.
        ema_decay: Memory of the moving averages, per training step.
        dead_code_threshold: In training, a code whose moving-average usage falls below this part of the fair share 1/K
            is set to a random residual of the batch and given the fair share anew. 0 turns it off. An optimizer that
            keeps averages of gradients is not told: a code that is not chosen gets no gradient, so that of Adam's
            moments the first has faded by then, and the second only sizes the new codeword's first steps.
        estimator: Who gets the gradient of `vectors` (choice S2); by moving averages only those that leave the
            codebooks alone or move the input in a way of their own: ``"straight_through"``, ``"rotation"`` and
            ``"gumbel"``.
        loss_form: Which loss (choice S3); ``"paper"`` only with ``codebook_update="gradient"``.
        temperature: Of the Gumbel-softmax; the closer to zero, the closer a mixture is to the nearest codeword.
        sinkhorn: Epsilon of the last level's assignment in training, relative to distances centred in -1..1: LETTER's
            is 0.003. None takes the nearest code. It may be set anew at any time.
        sinkhorn_iterations: Scalings of that assignment.

    Raises:
        InputError: An argument is out of its range, or does not go with another.
    """

    codebooks: Tensor  # (L, K, D)
    usage: Tensor  # (L, K) moving average of the share of rows that chose a code
    sums: Tensor  # (L, K, D) moving average of residuals; only with codebook_update="ema"
    initialised: Tensor  # () bool: `init_from_data` has run

    def __init__(
        self,
        dim: int,
        num_levels: int = 3,
        num_codes: int = 32,
        commitment: float = 0.25,
        codebook_update: Literal["ema", "gradient"] = "ema",
        ema_decay: float = 0.99,
        dead_code_threshold: float = 0.2,
        estimator: Estimator | Literal["gumbel"] = "straight_through",
        loss_form: Literal["vq", "paper"] = "vq",
        temperature: float = 0.2,
        sinkhorn: float | None = None,
        sinkhorn_iterations: int = 100,
    ) -> None:
        super().__init__()
        if dim < 1 or num_levels < 1 or num_codes < 2:
            raise InputError(
                "ResidualQuantizer needs dim and num_levels of 1 or more and num_codes of 2 or more, "
                f"got {dim=} {num_levels=} {num_codes=}"
            )
        if codebook_update not in ("ema", "gradient"):
            raise InputError(f"codebook_update must be 'ema' or 'gradient', got {codebook_update!r}")
        if not 0 <= ema_decay < 1:
            raise InputError(f"ema_decay must lie in [0, 1), got {ema_decay}")
        if commitment < 0:
            raise InputError(f"commitment must be 0 or more, got {commitment}")
        if not 0 <= dead_code_threshold < 1:
            raise InputError(f"dead_code_threshold is a part of the fair share, in [0, 1), got {dead_code_threshold}")
        estimators = (*get_args(Estimator), "gumbel")
        if estimator not in estimators:
            raise InputError(f"estimator must be one of {', '.join(estimators)}, got {estimator!r}")
        if loss_form not in ("vq", "paper"):
            raise InputError(f"loss_form must be 'vq' or 'paper', got {loss_form!r}")
        if codebook_update == "ema" and (estimator.startswith("gather") or loss_form == "paper"):
            raise InputError(
                f"{estimator=} with {loss_form=} sends gradients to the codebooks, and codebook_update='ema' learns "
                "them by moving averages; set codebook_update to 'gradient'"
            )
        if not 0 < temperature < float("inf"):
            raise InputError(f"temperature must be above 0 and finite, got {temperature}")
        if sinkhorn is not None:
            check_sinkhorn(sinkhorn, sinkhorn_iterations)
            if estimator == "gumbel":
                raise InputError("estimator='gumbel' mixes codewords by its own draw; leave sinkhorn at None with it")
        self.dim = dim
        self.num_levels = num_levels
        self.num_codes = num_codes
        self.commitment = commitment
        self.codebook_update = codebook_update
        self.ema_decay = ema_decay
        self.dead_code_threshold = dead_code_threshold
        self.estimator: Estimator | Literal["gumbel"] = estimator
        self.loss_form = loss_form
        self.temperature = temperature
        self.sinkhorn = sinkhorn
        self.sinkhorn_iterations = sinkhorn_iterations
        codebooks = torch.randn(num_levels, num_codes, dim) / dim**0.5  # (L, K, D)
        if codebook_update == "gradient":
            self.codebooks = nn.Parameter(codebooks)
        else:
            self.register_buffer("codebooks", codebooks)
            self.register_buffer("sums", codebooks / num_codes)
        self.register_buffer("usage", torch.full((num_levels, num_codes), 1 / num_codes))
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, x: Tensor) -> Quantized:
        """Quantize x (B, D), in the dtype of the codebooks; in training mode also update the codebook statistics."""
        x = x.to(self.codebooks.dtype)  # distances of half-precision rows would choose other codes than `encode`
        residual = x
        residuals, codes, words = [], [], []
        mixed = self.training and self.estimator == "gumbel"
        # A mixture's gradient reads the codebooks, which the statistics will have written to by then.
        codebooks = self.codebooks.clone() if mixed else self.codebooks  # (L, K, D)
        for level, codebook in enumerate(codebooks):  # (K, D)
            codes.append(self._choose(residual.detach(), codebook.detach(), level))  # (B,)
            words.append(gumbel_words(residual, codebook, self.temperature) if mixed else codebook[codes[-1]])  # (B, D)
            residuals.append(residual)
            residual = residual - words[-1].detach()  # (B, D)
        if self.training:
            self._update_statistics(torch.stack(residuals).detach(), torch.stack(codes))
        total = sum(words, torch.zeros_like(x))  # (B, D)
        loss = self._loss(x, residuals, words, total)
        vectors = total if self.estimator == "gumbel" else estimate(x, total, self.estimator)  # (B, D)
        return Quantized(vectors, torch.stack(codes, -1), loss, torch.stack(words, 1))

    def _choose(self, residual: Tensor, codebook: Tensor, level: int) -> Tensor:
        """Codes (B,) of what is left in front of a level (B, D), given its codebook (K, D)."""
        if self.training and self.sinkhorn is not None and level == self.num_levels - 1:
            return balanced_codes(squared_distances(residual, codebook), self.sinkhorn, self.sinkhorn_iterations)
        return nearest_code(residual, codebook)

    def _loss(self, x: Tensor, residuals: list[Tensor], words: list[Tensor], total: Tensor) -> Tensor:
        """The loss () of x (B, D), with the residual in front of each level and its codeword, each (B, D)."""
        pairs = list(zip(residuals, words, strict=True))
        if self.loss_form == "paper":
            terms = [self.commitment * _mean_square_norm(residual.detach() - word) for residual, word in pairs]
            return sum(terms, _mean_square_norm(x - total))
        loss = x.new_zeros(())
        for residual, word in pairs:
            loss = loss + self.commitment * _mean_square_norm(residual - word.detach())
            if self.codebook_update == "gradient":
                loss = loss + _mean_square_norm(residual.detach() - word)
        return loss

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes (B, L) of x (B, D)."""
        return residual_encode(x.to(self.codebooks.dtype), self.codebooks)

    def decode(self, codes: Tensor) -> Tensor:
        """Sum of the named codewords: codes (..., L) -> (..., D)."""
        return residual_decode(codes, self.codebooks)

    @torch.no_grad()
    def init_from_data(self, vectors: Tensor, num_iterations: int = 50, seed: int = 0) -> None:
        """Set the codebooks by residual k-means on vectors (N, D), and the moving averages to match.

        Under `torch.distributed` call it on every rank: all take rank 0's codebooks.
        """
        vectors = vectors.to(self.codebooks)
        codebooks = residual_kmeans(vectors, self.num_levels, self.num_codes, num_iterations, seed=seed)
        codes = residual_encode(vectors, codebooks)  # (N, L)
        usage = torch.stack([torch.bincount(code, minlength=self.num_codes) for code in codes.unbind(-1)]) / len(codes)
        self.codebooks.copy_(_of_rank_zero(codebooks))
        self.usage.copy_(_of_rank_zero(usage.to(self.usage)))
        if self.codebook_update == "ema":
            self.sums.copy_(self.usage[..., None] * self.codebooks)
        self.initialised.fill_(True)

    @torch.no_grad()
    def _update_statistics(self, residuals: Tensor, codes: Tensor) -> None:
        """Move the averages, and in EMA mode the codebooks, by one batch: residuals (L, B, D), codes (L, B)."""
        rows = torch.cat([torch.ones_like(residuals[..., :1]), residuals], -1)  # (L, B, 1 + D)
        batch = rows.new_zeros(self.num_levels, self.num_codes, 1 + self.dim)  # (L, K, 1 + D) counts, then sums
        for level in range(self.num_levels):
            batch[level].index_add_(0, codes[level], rows[level])
        if _several_ranks():
            dist.all_reduce(batch)
        batch /= batch[0, :, 0].sum()  # rows of all ranks
        self.usage.lerp_(batch[..., 0], 1 - self.ema_decay)
        if self.codebook_update == "ema":
            self.sums.lerp_(batch[..., 1:], 1 - self.ema_decay)
            alive = (self.usage > _SMALLEST_USAGE)[..., None]  # (L, K, 1)
            means = self.sums / self.usage.clamp(min=_SMALLEST_USAGE)[..., None]  # (L, K, D)
            self.codebooks.copy_(torch.where(alive, means, self.codebooks))
        if self.dead_code_threshold > 0:
            self._revive_dead_codes(residuals)

    def _revive_dead_codes(self, residuals: Tensor) -> None:
        """Set codes that hardly any row chooses to residuals (L, B, D) of random rows of this batch."""
        num_rows = residuals.shape[1]
        picks = torch.randperm(num_rows, device=residuals.device)  # (B,)
        picks = picks.repeat(-(-self.num_codes // num_rows))[: self.num_codes]  # (K,)
        # Drawn and sent at each step, dead codes or none: to ask first would make the host wait for the device.
        fresh = _of_rank_zero(residuals[:, picks].contiguous())  # (L, K, D)
        dead = self.usage < self.dead_code_threshold / self.num_codes  # (L, K)
        self.codebooks.copy_(torch.where(dead[..., None], fresh, self.codebooks))
        self.usage.masked_fill_(dead, 1 / self.num_codes)
        if self.codebook_update == "ema":
            self.sums.copy_(torch.where(dead[..., None], fresh / self.num_codes, self.sums))


def _mean_square_norm(rows: Tensor) -> Tensor:
    return rows.square().sum(-1).mean()  # ()


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _of_rank_zero(tensor: Tensor) -> Tensor:
    """Rank 0's value of a tensor, on every rank."""
    if not _several_ranks():
        return tensor
    # NCCL carries GPU tensors only, and codebooks may be initialised before the model moves to its device.
    sent = tensor.cuda() if dist.get_backend() == "nccl" else tensor.clone()
    dist.broadcast(sent, src=0)
    return sent.to(tensor.device)
