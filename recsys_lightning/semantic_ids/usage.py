"""How evenly the codes of each level are used: one measure for collision reports and for training logs."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from recsys_lightning.errors import InputError


class CodeUsage(NamedTuple):
    """Usage of the codes of each level."""

    counts: Tensor  # (L, K) int64, rows that hold a code
    entropy: Tensor  # (L,) nats, between 0 and log K
    entropy_share: Tensor  # (L,) entropy / log K
    perplexity: Tensor  # (L,) exp(entropy): the number of evenly used codes of the same entropy
    num_used: Tensor  # (L,) int64, codes that some row holds
    num_dead: Tensor  # (L,) int64, codes that no row holds
    gini: Tensor  # (L,) of the counts: 0 where all codes are used alike, (K - 1) / K where one holds all rows


def code_usage(codes: Tensor, num_codes: int) -> CodeUsage:
    """Entropy, perplexity and dead codes of each level.

    With p_k the share of rows that hold code k: ``entropy = -sum_k p_k log p_k``, ``perplexity = exp(entropy)``,
    and with n_(1) <= ... <= n_(K) the counts ``gini = sum_k (2k - K - 1) n_(k) / (K N)``: half the mean difference of
    two codes' counts, as a share of the mean count.

    Args:
        codes: (N, L) integer codes in 0..K-1, without padding rows.
        num_codes: Codes K a level.

    Raises:
        InputError: No rows, or not two axes.
    """
    if codes.ndim != 2 or len(codes) == 0:
        raise InputError(f"code usage needs codes of shape (N, L) with at least one row, got {tuple(codes.shape)}")
    num_levels = codes.shape[1]
    # One count for all levels: code k of level l falls into bin l * K + k.
    bins = codes + num_codes * torch.arange(num_levels, device=codes.device)  # (N, L)
    counts = torch.bincount(bins.flatten(), minlength=num_levels * num_codes).view(num_levels, num_codes)  # (L, K)
    entropy = torch.special.entr(counts.float() / len(codes)).sum(-1)  # (L,)
    num_used = (counts > 0).sum(-1)  # (L,)
    ranks = torch.arange(1 - num_codes, num_codes, 2, device=codes.device)  # (K,) 2k - K - 1
    gini = (counts.sort(-1).values * ranks).sum(-1).double() / (num_codes * len(codes))  # (L,)
    return CodeUsage(
        counts=counts,
        entropy=entropy,
        entropy_share=entropy / math.log(max(num_codes, 2)),
        perplexity=entropy.exp(),
        num_used=num_used,
        num_dead=num_codes - num_used,
        gini=gini.float(),
    )
