"""Mending the codebooks of a residual quantizer: fresh codewords for those that hardly any row chooses.

Shapes: N rows, D width, L levels, K codes a level.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from recsys_lightning.errors import InputError
from recsys_lightning.nn.codebook import nearest_code
from recsys_lightning.nn.quantize import ResidualQuantizer, residual_encode, residual_kmeans
from recsys_lightning.nn.sinkhorn import SMALLEST_EPSILON

# A code with less than this part of the fair share 1/K of the rows counts as dead, as in `ResidualQuantizer`.
HARDLY_USED = 0.2
# Rows that a repair looks at: enough for 256 codes, and seconds of k-means.
MOST_ROWS = 65_536
ROUNDS = 10
SINKHORN_FACTOR = 2.0
LARGEST_SINKHORN = 0.5


class Repaired(NamedTuple):
    """Codebooks as they shall be; nothing is changed before `install`. All on the CPU, on every process the same."""

    codebooks: Tensor  # (L, K, D)
    usage: Tensor  # (L, K) share of the rows that choose a code; of a fresh one at least the fair share 1/K
    changed: Tensor  # (L, K) bool, codewords that are new


@torch.no_grad()
def reset_dead(codebooks: Tensor, vectors: Tensor, first: int, seed: int = 0) -> Repaired:
    """Codewords that hardly any row chooses, replaced near the rows that the codes serve worst.

    From level `first` on, coarse to fine, each on what the mended levels before it leave. A code that fewer than
    `HARDLY_USED` / K of the rows choose begins anew:

    * at a row, drawn with a chance proportional to its squared distance to the nearest codeword, fresh ones included:
      k-means++ seeding (Arthur and Vassilvitskii, 2007) around the codewords that are kept. To take the worst rows
      themselves would collect outliers;
    * then `ROUNDS` of k-means move the fresh codewords, and no others. One that has hardly any rows yet moves half way
      to the nearest codeword that is kept: in many dimensions a row is nearer to the centre of all than to another row,
      and a codeword on it would have that row alone.

    Levels after the first are mended too, since what they quantize is no longer what they have learned. Where fewer
    distinct rows are left than codes, the other codes stay as they are.

    Args:
        codebooks: (L, K, D).
        vectors: (N, D) what is quantized, of all rows that may be learned from; at most `MOST_ROWS` are looked at.
        first: level, from 0.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    codebooks, rows = codebooks.detach().cpu().clone(), _sample(vectors, generator)  # (L, K, D), (N, D)
    num_codes, residual = codebooks.shape[1], rows
    changed = torch.zeros(codebooks.shape[:2], dtype=torch.bool)
    for level, codebook in enumerate(codebooks):  # (K, D) a view: what is written to it is in `codebooks`
        if level >= first:
            counts = torch.bincount(nearest_code(residual, codebook), minlength=num_codes)  # (K,)
            dead = counts < HARDLY_USED * len(rows) / num_codes  # (K,)
            fresh = _spread(residual, codebook[~dead], int(dead.sum()), generator)  # (F, D)
            replaced = dead.nonzero()[: len(fresh), 0]  # (F,)
            changed[level, replaced] = True
            codebook[replaced] = fresh
            if len(fresh):
                _settle(residual, codebook, replaced, codebook[~dead])
        residual = residual - codebook[nearest_code(residual, codebook)]  # (N, D)
    return Repaired(codebooks, _usage(codebooks, rows, changed), changed)


@torch.no_grad()
def reseed(codebooks: Tensor, vectors: Tensor, first: int, seed: int = 0) -> Repaired:
    """Level `first`, from 0, and those after it learned anew by k-means on what the levels before it leave.

    Shapes as of `reset_dead`; all codewords of these levels are new.
    """
    generator = torch.Generator().manual_seed(seed)
    kept, rows = codebooks.detach().cpu()[:first], _sample(vectors, generator)  # (first, K, D), (N, D)
    residual = rows
    for codebook in kept:
        residual = residual - codebook[nearest_code(residual, codebook)]  # (N, D)
    num_levels, num_codes, _ = codebooks.shape
    fresh = residual_kmeans(residual, num_levels - first, num_codes, seed=seed)  # (L - first, K, D)
    changed = (torch.arange(num_levels) >= first)[:, None].repeat(1, num_codes)  # (L, K)
    codebooks = torch.cat([kept, fresh])
    return Repaired(codebooks, _usage(codebooks, rows, torch.zeros_like(changed)), changed)


@torch.no_grad()
def install(quantizer: ResidualQuantizer, repaired: Repaired) -> None:
    """Give a quantizer its new codewords, and usage and moving averages that agree with them.

    Of a level without new codewords everything stays.
    """
    levels = repaired.changed.any(1)  # (L,)
    device = quantizer.codebooks.device
    quantizer.codebooks[levels] = repaired.codebooks[levels].to(device)
    quantizer.usage[levels] = repaired.usage[levels].to(quantizer.usage)
    if quantizer.codebook_update == "ema":
        quantizer.sums[levels] = (quantizer.usage[..., None] * quantizer.codebooks)[levels]


@torch.no_grad()
def forget(optimizer: Optimizer, codebooks: Tensor, changed: Tensor) -> None:
    """Set what an optimizer remembers of new codewords to zero, such as Adam's moments: changed (L, K) bool.

    It would push them where the old ones were going.
    """
    for value in optimizer.state.get(codebooks, {}).values():
        if isinstance(value, Tensor) and value.shape == codebooks.shape:
            value[changed.to(value.device)] = 0


def raise_sinkhorn(quantizer: ResidualQuantizer) -> float:
    """Balance the last level's codes in training harder, and return the new epsilon.

    It goes up by `SINKHORN_FACTOR`, from none to `SMALLEST_EPSILON` first, and no higher than `LARGEST_SINKHORN`.

    Raises:
        InputError: the quantizer draws codewords by Gumbel noise, which leaves nothing to assign.
    """
    if quantizer.estimator == "gumbel":
        raise InputError("estimator='gumbel' mixes codewords by its own draw; Sinkhorn assignment cannot mend it")
    old = quantizer.sinkhorn
    quantizer.sinkhorn = SMALLEST_EPSILON if old is None else max(old, min(old * SINKHORN_FACTOR, LARGEST_SINKHORN))
    return quantizer.sinkhorn


def _sample(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """At most `MOST_ROWS` rows (N, D) on the CPU in single precision."""
    rows = vectors.detach()
    if len(rows) > MOST_ROWS:
        rows = rows[torch.randperm(len(rows), generator=generator)[:MOST_ROWS].to(rows.device)]
    return rows.float().cpu()


def _spread(rows: Tensor, kept: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` of the rows (N, D), far from the codewords `kept` (M, D) and from one another: (F, D)."""
    nearest = kept[nearest_code(rows, kept)]  # (N, D)
    left = (rows - nearest).square().sum(-1)  # (N,)
    fresh: list[Tensor] = []
    while len(fresh) < count and bool(left.any()):
        fresh.append(rows[torch.multinomial(left, 1, generator=generator)[0]])  # (D,)
        left = torch.minimum(left, (rows - fresh[-1]).square().sum(-1))
    return torch.stack(fresh) if fresh else rows[:0]


def _settle(rows: Tensor, codebook: Tensor, fresh: Tensor, kept: Tensor) -> None:
    """Move the codewords `fresh` (F,) of a codebook (K, D), in place, to the middle of the rows (N, D) they have.

    Those with hardly any go half way to the nearest of the codewords `kept` (M, D).
    """
    for _ in range(ROUNDS):
        codes = nearest_code(rows, codebook)  # (N,)
        counts = torch.bincount(codes, minlength=len(codebook))[fresh]  # (F,)
        sums = torch.zeros_like(codebook).index_add_(0, codes, rows)[fresh]  # (F, D)
        means = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codebook[fresh])  # (F, D)
        lonely = counts < HARDLY_USED * len(rows) / len(codebook)  # (F,)
        codebook[fresh] = torch.where(lonely[:, None], (means + kept[nearest_code(means, kept)]) / 2, means)


def _usage(codebooks: Tensor, rows: Tensor, fresh: Tensor) -> Tensor:
    """(L, K) share of rows (N, D) that choose each code; of `fresh` ones (L, K) at least 1/K, or they die anew."""
    num_codes = codebooks.shape[1]
    codes = residual_encode(rows, codebooks)  # (N, L)
    counts = torch.stack([torch.bincount(code, minlength=num_codes) for code in codes.unbind(-1)])  # (L, K)
    usage = counts.float() / len(rows)
    return torch.where(fresh, usage.clamp(min=1 / num_codes), usage)
