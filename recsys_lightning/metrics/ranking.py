"""Recall, NDCG, MRR, hit rate and MAP of ranked answers, averaged over users.

Users without a relevant answer are left out of both the sum and the count of users. Ties: every metric is its expected
value when items of equal score stand in random order (see `ties`), so a model that scores all items alike is worth
chance, not the luck of its sorting. A list shorter than k is taken as it is: the missing places miss.

Shapes: B users.
"""

import difflib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from recsys_lightning.errors import InputError
from recsys_lightning.metrics.ranks import TargetRanks
from recsys_lightning.metrics.states import SummedMetric, sorted_ks
from recsys_lightning.metrics.ties import (
    TieGroups,
    expected_average_precision,
    expected_hit,
    expected_ndcg,
    expected_ndcg_of_found,
    expected_recall,
    expected_reciprocal_rank,
    tie_groups,
)

Normalizer = Literal["ideal", "comirec"]


class _UserMean(SummedMetric):
    """Mean over users of a score in 0..1 for the first k places. NaN if no user had a relevant answer."""

    higher_is_better = True

    total: Tensor  # () float64
    num_users: Tensor  # () long

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise InputError(f"a ranking metric needs k of at least 1, got k={k}")
        self.k = k
        self.add_sum("total")
        self.add_sum("num_users", dtype=torch.long)

    def update(self, ranks: TargetRanks | TieGroups) -> None:
        """Add the users of a batch; few large batches cost much less than many small ones."""
        groups = _grouped(ranks)
        self.total += self._expected(groups).sum()
        self.num_users += (groups.num_relevant > 0).sum()

    def compute(self) -> Tensor:
        """Mean over the users seen so far, () float64 in 0..1; NaN if there were none."""
        return self.total / self.num_users

    def values(self, ranks: TargetRanks | TieGroups) -> Tensor:
        """The score of each user, (B,) float64; NaN for a user without a relevant answer. The state stays as it is."""
        groups = _grouped(ranks)
        return torch.where(groups.num_relevant > 0, self._expected(groups), torch.nan)

    @abstractmethod
    def _expected(self, groups: TieGroups) -> Tensor:
        """Expected score of each user, (B,) float64; 0 for a user without a relevant answer."""


class RecallAtK(_UserMean):
    """Recall@k: relevant answers among the first k places / relevant answers of the user.

    With one relevant answer a user this is the hit rate.
    """

    def _expected(self, groups: TieGroups) -> Tensor:
        return expected_recall(groups, self.k)


class NDCGAtK(_UserMean):
    """NDCG@k with binary gains: DCG = sum over relevant ranks p <= k of 1 / log2(p + 1), over the best DCG.

    Args:
        k: cut-off.
        normalizer: which DCG is the best. ``"ideal"``: that of a list that begins with all relevant answers, at most k.
            ``"comirec"``: that of a list that begins with as many as were found, 0 if none was; the public evaluation
            of ComiRec (arXiv:2005.09347) does so, and it forgives what was missed.

    With one relevant answer a user both are 1 / log2(p + 1).
    """

    def __init__(self, k: int, normalizer: Normalizer = "ideal") -> None:
        super().__init__(k)
        _check_name(normalizer, ("ideal", "comirec"), "NDCG normalizer")
        self.normalizer = normalizer

    def _expected(self, groups: TieGroups) -> Tensor:
        return (expected_ndcg if self.normalizer == "ideal" else expected_ndcg_of_found)(groups, self.k)


class MRRAtK(_UserMean):
    """MRR@k: 1 / rank of the first relevant answer, 0 if none is among the first k places."""

    def _expected(self, groups: TieGroups) -> Tensor:
        return expected_reciprocal_rank(groups, self.k)


class HitRateAtK(_UserMean):
    """HitRate@k: whether a relevant answer is among the first k places."""

    def _expected(self, groups: TieGroups) -> Tensor:
        return expected_hit(groups, self.k)


class MAPAtK(_UserMean):
    """MAP@k: sum over relevant ranks p <= k of the precision at p, over min(k, relevant answers of the user).

    The precision at p is (relevant answers among the first p places) / p. A perfect list scores 1 also where there are
    more relevant answers than k; trec_eval divides by all relevant answers instead.
    """

    def _expected(self, groups: TieGroups) -> Tensor:
        return expected_average_precision(groups, self.k)


class RankingMetrics(MetricCollection):
    """Ranking metrics that are updated together: the ties of a batch are worked out once for all of them."""

    def __init__(self, metrics: dict[str, Metric]) -> None:
        # Compute groups would join metrics whose first batch gives equal sums, as recall@5 and recall@10 often do at 0,
        # and from then on show one for the other.
        super().__init__(metrics, compute_groups=False)  # type: ignore[arg-type]

    def update(self, ranks: TargetRanks | TieGroups) -> None:  # type: ignore[override]
        """Add the users of a batch; few large batches cost much less than many small ones."""
        super().update(_grouped(ranks))


KINDS = ("recall", "ndcg", "mrr", "hit_rate", "map")


def ranking_metrics(
    ks: Sequence[int] = (5, 10, 20, 50), kinds: Sequence[str] = KINDS, ndcg_normalizer: Normalizer = "ideal"
) -> RankingMetrics:
    """Metrics of each kind at each k, under the names ``recall@5``, ``ndcg@5``, ``mrr@5``, ``hit_rate@5``, ``map@5``.

    Args:
        ks: cut-offs, each at least 1, in any order, none twice; above the length of the lists is fine.
        kinds: which metrics, none twice.
        ndcg_normalizer: see `NDCGAtK`.

    Raises:
        InputError: ``ks`` or ``kinds`` is empty, repeats a value or holds one that there is not.
    """
    make: dict[str, Callable[[int], Metric]] = {
        "recall": RecallAtK,
        "ndcg": lambda k: NDCGAtK(k, ndcg_normalizer),
        "mrr": MRRAtK,
        "hit_rate": HitRateAtK,
        "map": MAPAtK,
    }
    if not kinds or len(set(kinds)) != len(kinds):
        raise InputError(f"name different kinds of ranking metrics, got kinds={list(kinds)}")
    for kind in kinds:
        _check_name(kind, KINDS, "ranking metric")
    return RankingMetrics({f"{kind}@{k}": make[kind](k) for k in sorted_ks(ks) for kind in kinds})


def _grouped(ranks: TargetRanks | TieGroups) -> TieGroups:
    return ranks if isinstance(ranks, TieGroups) else tie_groups(ranks)


def _check_name(name: Any, known: Iterable[str], what: str) -> None:
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0)
        raise InputError(f"there is no {what} {name!r}: did you mean {near[0]!r}? There are {', '.join(names)}")
