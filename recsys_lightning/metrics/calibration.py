"""Calibration: whether a claimed probability is the share of cases in which the claim holds.

Bins hold equally many cases. torchmetrics' `BinaryCalibrationError` has bins of equal width on 0..1: the chance that a
recommender's first item is the right one seldom exceeds a few percent, so nearly all users would fall into one bin, and
its error would be the difference of two means and no more.

Source: Guo et al., On Calibration of Modern Neural Networks (ICML 2017); equal masses: Nguyen & O'Connor (EMNLP 2015).
Axis letters: B cases, N bins.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Reliability(NamedTuple):
    """Cases by their claimed probability, the lowest first."""

    cases: Tensor  # (N,) long; no bin is empty
    claimed: Tensor  # (N,) float64 their mean claimed probability
    observed: Tensor  # (N,) float64 the share of them in which the claim holds

    def error(self) -> float:
        """Expected calibration error: ``sum over bins of cases / B * |observed - claimed|``."""
        return float((self.cases * (self.observed - self.claimed).abs()).sum() / self.cases.sum())


def reliability(claimed: Tensor, correct: Tensor, num_bins: int = 15) -> Reliability:
    """Sort cases into bins of equal mass, whose edges are quantiles of the claims.

    Equal claims fall into one bin, so the order of the cases does not matter; where many are equal bins are fewer.

    Args:
        claimed: (B,) probabilities.
        correct: (B,) whether the claim holds; also shares in 0..1.
        num_bins: bins, where all claims differ.

    Raises:
        ValueError: no cases, unequal lengths, no bins, or claims outside 0..1.
    """
    if claimed.ndim != 1 or claimed.shape != correct.shape or len(claimed) == 0 or num_bins < 1:
        shapes = f"{tuple(claimed.shape)} and {tuple(correct.shape)}"
        raise ValueError(f"need claimed (B,) and correct (B,) of at least one case and num_bins >= 1, got {shapes}")
    claimed, correct = claimed.double(), correct.double()
    if not bool(((claimed >= 0) & (claimed <= 1 + 1e-6)).all()):
        raise ValueError("claimed probabilities must lie in 0..1")
    ordered = claimed.sort().values
    # The first claim of each bin but the lowest; by place, since torch.quantile refuses more than 2**24 values.
    place = torch.arange(1, num_bins, device=claimed.device) * len(claimed) // num_bins
    bins = torch.searchsorted(ordered[place], claimed, right=True)  # (B,)
    count = bins.bincount(minlength=num_bins)
    sums = [torch.zeros(num_bins, dtype=torch.float64, device=claimed.device) for _ in range(2)]
    means = [total.index_add(0, bins, part) / count for total, part in zip(sums, (claimed, correct), strict=True)]
    kept = count > 0
    return Reliability(count[kept], means[0][kept], means[1][kept])
