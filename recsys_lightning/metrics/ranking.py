"""Recall, NDCG and MRR of recommended item ids, averaged over users.

Every metric is a sum over users and a count of users, so batches and ranks merge by addition. Shapes: B users, R places
of the recommendation list (best first), N relevant items of a user; item id 0 is padding.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from recsys_lightning.errors import InputError


def hits(recommended: Tensor, relevant: Tensor) -> Tensor:
    """Places of the recommendation lists that hold a relevant item, by exact item id.

    Padding never hits. An item that is recommended twice hits at its first place only.

    Args:
        recommended: (B, R) long, best first, 0 = padding.
        relevant: (B, N) long, 0 = padding.

    Returns:
        (B, R) bool.

    Raises:
        ValueError: The two are not matrices of the same number of rows.
    """
    if recommended.ndim != 2 or relevant.ndim != 2 or len(recommended) != len(relevant):
        raise ValueError(
            f"need recommended (B, R) and relevant (B, N), got {tuple(recommended.shape)} and {tuple(relevant.shape)}"
        )
    match = (recommended[:, :, None] == relevant[:, None, :]).any(-1) & (recommended != 0)  # (B, R)
    return match & ~_seen_before(recommended)


def count_relevant(relevant: Tensor) -> Tensor:
    """Number of different relevant items of each user: (B, N) long, 0 = padding, gives (B,) long."""
    return ((relevant != 0) & ~_seen_before(relevant)).sum(-1)


def _seen_before(ids: Tensor) -> Tensor:
    """Places of (B, R) ids whose id stands at an earlier place of the row, (B, R) bool."""
    ordered, place = ids.sort(dim=1, stable=True)  # stable: among equals the first place comes first
    repeat = torch.zeros_like(ids, dtype=torch.bool)
    repeat[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(repeat).scatter(1, place, repeat)


class _UserMean(Metric):
    """Mean over users of a score in 0..1 for the first k places.

    Users without a relevant item are left out of both sum and count. With no user at all the value is NaN. Lists
    shorter than k are taken as they are: the missing places miss.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    total: Tensor  # () float64: float32 sums drift from about a million users on
    num_users: Tensor  # () long

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise InputError(f"a ranking metric needs k of at least 1, got k={k}")
        self.k = k
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_users", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, hits: Tensor, num_relevant: Tensor) -> None:
        """Add the users of a batch.

        Args:
            hits: (B, R) bool, from ``hits``.
            num_relevant: (B,) long, from ``count_relevant``.

        Raises:
            ValueError: The shapes are not (B, R) and (B,).
        """
        if hits.ndim != 2 or num_relevant.shape != hits.shape[:1]:
            raise ValueError(
                f"need hits (B, R) and num_relevant (B,), got {tuple(hits.shape)} and {tuple(num_relevant.shape)}"
            )
        counted = num_relevant > 0  # (B,)
        scores = self._score(hits[:, : self.k].double(), num_relevant.clamp(min=1))  # (B,)
        self.total += torch.where(counted, scores, 0.0).sum()
        self.num_users += counted.sum()

    def compute(self) -> Tensor:
        """Mean over the users seen so far, () float64 in 0..1; NaN if there were none."""
        return self.total / self.num_users

    @abstractmethod
    def _score(self, hits: Tensor, num_relevant: Tensor) -> Tensor:
        """Score of each user, (B,) float64, from (B, min(R, k)) hits and (B,) counts of at least 1."""


class RecallAtK(_UserMean):
    """Recall@k: relevant items among the first k places / relevant items of the user.

    With one relevant item a user this is the hit rate.
    """

    def _score(self, hits: Tensor, num_relevant: Tensor) -> Tensor:
        return hits.sum(-1) / num_relevant


class NDCGAtK(_UserMean):
    """NDCG@k with binary gains: sum over hits at rank r <= k of 1 / log2(r + 1), over the best that sum could be.

    The best has the first min(k, relevant items) places hit. With one relevant item it is 1, which gives the usual
    leave-one-out 1 / log2(r + 1).
    """

    def _score(self, hits: Tensor, num_relevant: Tensor) -> Tensor:
        rank = torch.arange(1, self.k + 1, dtype=torch.float64, device=hits.device)  # (k,)
        discount = 1 / torch.log2(rank + 1)  # (k,)
        ideal = discount.cumsum(0)[num_relevant.clamp(max=self.k) - 1]  # (B,)
        return (hits * discount[: hits.shape[1]]).sum(-1) / ideal


class MRRAtK(_UserMean):
    """MRR@k: 1 / rank of the first hit, 0 when there is none among the first k places."""

    def _score(self, hits: Tensor, num_relevant: Tensor) -> Tensor:
        rank = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device=hits.device)  # (min(R, k),)
        return torch.cat([hits / rank, hits.new_zeros(len(hits), 1)], -1).amax(-1)  # a list may have no place at all


def ranking_metrics(ks: Sequence[int] = (5, 10, 20, 50)) -> MetricCollection:
    """Recall, NDCG and MRR at each k, under the names ``recall@5``, ``ndcg@5``, ``mrr@5``, ...

    Args:
        ks: Lengths of list, each at least 1, in any order, none twice.

    Raises:
        InputError: ``ks`` is empty, repeats a value or holds one below 1.
    """
    if not ks or len(set(ks)) != len(ks) or min(ks) < 1:
        raise InputError(f"ranking metrics need different ks of at least 1, got ks={list(ks)}")
    kinds: dict[str, Callable[[int], Metric]] = {"recall": RecallAtK, "ndcg": NDCGAtK, "mrr": MRRAtK}
    metrics: dict[str, Metric] = {f"{name}@{k}": kind(k) for k in ks for name, kind in kinds.items()}
    # Compute groups would join metrics whose first batch gives equal sums, as recall@5 and recall@10 often do at 0,
    # and from then on show one for the other.
    return MetricCollection(metrics, compute_groups=False)  # type: ignore[arg-type]
