"""Metrics of the recommended lists themselves, whatever the right answers are.

Each takes all cut-offs at once, because they share the costly part, and computes to a dict such as
``{"novelty@5": ..., "novelty@10": ...}``. A value that no list counts for is left out.

Shapes: B users, R places of a list, K here the longest cut-off, I items, D width. Item id 0 is padding: a place of the
list that holds no item.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from recsys_lightning.errors import InputError
from recsys_lightning.metrics.ranks import repeats
from recsys_lightning.metrics.states import SummedMetric, sorted_ks


class ExposureAtK(SummedMetric):
    """How recommendations spread over the catalogue: ``coverage@k`` and ``gini@k``.

    Coverage is the share of the items that are in the first k places of at least one list. Gini is that of the numbers
    of lists' places that the I items got: 0 when all got the same, (I-1)/I when one got all,
    ``sum over i of (2i - I - 1) x_i / (I sum of x)`` with x ascending.

    Args:
        ks: cut-offs.
        num_items: I.
    """

    counts: Tensor  # (len(ks), I+1) long: places after the cut-off before and up to this one

    def __init__(self, ks: Sequence[int], num_items: int) -> None:
        super().__init__()
        self.ks = sorted_ks(ks)
        self.num_items = num_items
        self.add_sum("counts", len(self.ks), num_items + 1, dtype=torch.long)

    def update(self, item_ids: Tensor) -> None:
        """Add the lists (B, R) of a batch."""
        ids = _first_places(item_ids, self.ks[-1])  # (B, K)
        start = 0
        for number, k in enumerate(self.ks):
            part = ids[:, start:k].flatten()
            self.counts[number].scatter_add_(0, part, torch.ones_like(part))  # in place: the cost does not grow with I
            start = k

    def compute(self) -> dict[str, Tensor]:
        """Both values at each k, () float64."""
        values = {}
        counts = self.counts[:, 1:].double().cumsum(0)  # (len(ks), I)
        steps = 2 * torch.arange(1, self.num_items + 1, dtype=torch.float64, device=counts.device) - self.num_items - 1
        for k, count in zip(self.ks, counts, strict=True):
            if count.any():
                values[f"coverage@{k}"] = (count > 0).double().mean()
                values[f"gini@{k}"] = (steps * count.sort().values).sum() / (self.num_items * count.sum())
        return values


class _ListMean(SummedMetric):
    """Mean of something over lists, or over their places."""

    name: ClassVar[str]

    total: Tensor  # (len(ks),) float64
    number: Tensor  # (len(ks),) long
    last: Tensor  # (len(ks),) long index of the last place of each cut-off

    def __init__(self, ks: Sequence[int]) -> None:
        super().__init__()
        self.ks = sorted_ks(ks)
        self.register_buffer("last", torch.tensor(self.ks) - 1, persistent=False)
        self.add_sum("total", len(self.ks))
        self.add_sum("number", len(self.ks), dtype=torch.long)

    def update(self, item_ids: Tensor) -> None:
        """Add the lists (B, R) of a batch."""
        total, number = self._count(_first_places(item_ids, self.ks[-1]))
        self.total += total
        self.number += number

    def compute(self) -> dict[str, Tensor]:
        """The mean at each k, () float64."""
        means = zip(self.ks, self.total / self.number, self.number, strict=True)
        return {f"{self.name}@{k}": mean for k, mean, number in means if number > 0}

    def _at_ks(self, by_place: Tensor) -> Tensor:
        """(len(ks),) sums over the first k places of (K,) values by place."""
        return by_place.cumsum(0)[self.last]

    def _lists(self, ids: Tensor) -> Tensor:
        """(len(ks),) lists with an item among the first k places."""
        started = (ids != 0).cummax(1).values  # (B, K)
        return started.sum(0)[self.last]

    @abstractmethod
    def _count(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the values of the lists (B, K) and how many values these are, (len(ks),) each."""


class NoveltyAtK(_ListMean):
    """Mean over the recommended places of -log2(share of the training interactions that fall on the item), in bits.

    An item that training never met counts as half an interaction, so that it is more novel than one met once.

    Args:
        ks: cut-offs.
        train_counts: (I+1,) interactions of each item in training.

    Raises:
        InputError: there are no training interactions.
    """

    name = "novelty"
    information: Tensor  # (I+1,) float64 bits, 0 for padding

    def __init__(self, ks: Sequence[int], train_counts: Tensor) -> None:
        super().__init__(ks)
        counts = train_counts.double()
        if counts[1:].sum() == 0:
            raise InputError("novelty needs items that were met in training, and no item was")
        information = -torch.log2(counts.clamp(min=0.5) / counts[1:].sum())
        information[0] = 0
        self.register_buffer("information", information, persistent=False)

    def _count(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self._at_ks(self.information[ids].sum(0)), self._at_ks((ids != 0).sum(0))


class IntraListDistanceAtK(_ListMean):
    """Mean over lists of the mean of 1 - cosine over the pairs of their first k items.

    Lists with fewer than 2 items among them are left out. An item with a vector of zeros has cosine 0 with every other.
    With unit vectors u the sum of the cosines over ordered pairs is |sum of u|^2 - sum of |u|^2: no pair is visited.

    Args:
        ks: cut-offs.
        vectors: (I+1, D) float of the items, kept without a copy; row 0 is not read.

    Raises:
        InputError: a vector holds NaN or infinity.
    """

    name = "intra-list-distance"
    vectors: Tensor  # (I+1, D)
    scales: Tensor  # (I+1,) 1 / norm, 0 for a vector of zeros
    starts: Tensor  # (len(ks),) long index of the first place after the cut-off before

    def __init__(self, ks: Sequence[int], vectors: Tensor) -> None:
        super().__init__(ks)
        vectors = vectors.detach()
        norms = vectors.norm(dim=1)  # (I+1,)
        bad = ~norms[1:].isfinite()
        if bad.any():
            raise InputError(
                f"the vectors of {int(bad.sum())} items, first {int(bad.nonzero()[0, 0]) + 1}, are not finite"
            )
        scales = torch.where(norms > 0, 1 / norms, 0.0)
        scales[0] = 0
        self.register_buffer("vectors", vectors, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("starts", torch.tensor([0, *self.ks[:-1]]), persistent=False)

    def _count(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        # Each stretch of places between two cut-offs is summed once, in one pass that copies no vector.
        bags = torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1] + self.starts  # (B, ks)
        scales = self.scales[ids]  # (B, K)
        flat, starts, weights = ids.flatten(), bags.flatten(), scales.flatten()
        sums = F.embedding_bag(flat, self.vectors, starts, mode="sum", per_sample_weights=weights)  # (B ks, D)
        sums = sums.view(len(ids), len(self.ks), -1).cumsum(1)  # (B, ks, D)
        unit = (scales > 0).cumsum(1)[:, self.last]  # (B, ks) sum of |u|^2
        number = (ids != 0).cumsum(1)[:, self.last]  # (B, ks)
        cosines = (sums.square().sum(-1).double() - unit) / (number * (number - 1)).clamp(min=1)
        counted = number > 1
        return torch.where(counted, 1 - cosines, 0.0).sum(0), counted.sum(0)


class DistinctCodesAtK(_ListMean):
    """Mean over lists of the number of different level-1 codes among the first k items; empty lists are left out.

    Args:
        ks: cut-offs.
        codes: (I+1,) long level-1 code of each item; index 0 is not read.
    """

    name = "distinct-codes"
    codes: Tensor  # (I+1,) long

    def __init__(self, ks: Sequence[int], codes: Tensor) -> None:
        super().__init__(ks)
        codes = codes.clone()
        codes[0] = -1  # padding shares no code with an item
        self.register_buffer("codes", codes, persistent=False)

    def _count(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        new = ~repeats(self.codes[ids]) & (ids != 0)
        return self._at_ks(new.sum(0).double()), self._lists(ids)


class DuplicatesAtK(_ListMean):
    """Mean over lists of the number of their first k places that repeat an item; 0 for every sound model."""

    name = "duplicates"

    def _count(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        again = repeats(ids) & (ids != 0)
        return self._at_ks(again.sum(0).double()), self._lists(ids)


def list_metrics(
    ks: Sequence[int],
    num_items: int,
    train_counts: Tensor,
    vectors: Tensor | None = None,
    level1_codes: Tensor | None = None,
) -> MetricCollection:
    """All metrics of lists, updated with ``item_ids`` (B, R), under names such as ``coverage@10``.

    These are ``coverage``, ``gini``, ``novelty``, ``duplicates``, with `vectors` ``intra-list-distance``, and with
    `level1_codes` ``distinct-codes``.

    Args:
        ks: cut-offs, each at least 1, in any order, none twice.
        num_items: I.
        train_counts: (I+1,) interactions of each item in training.
        vectors: (I+1, D) float of the items.
        level1_codes: (I+1,) long.

    Raises:
        InputError: the ks are no cut-offs, or see the single metrics.
        ValueError: a table has not I+1 rows.
    """
    tables = {"train_counts": train_counts, "vectors": vectors, "level1_codes": level1_codes}
    for name, table in tables.items():
        if table is not None and len(table) != num_items + 1:
            raise ValueError(f"{name} has {len(table)} rows for {num_items} items and padding")
    metrics: dict[str, Metric] = {
        "exposure": ExposureAtK(ks, num_items),
        "novelty": NoveltyAtK(ks, train_counts),
        "duplicates": DuplicatesAtK(ks),
    }
    if vectors is not None:
        metrics["intra-list-distance"] = IntraListDistanceAtK(ks, vectors)
    if level1_codes is not None:
        metrics["distinct-codes"] = DistinctCodesAtK(ks, level1_codes)
    # Compute groups would join metrics whose first batch gives equal sums, and show one for the other from then on.
    return MetricCollection(metrics, compute_groups=False)  # type: ignore[arg-type]


def _first_places(item_ids: Tensor, k: int) -> Tensor:
    """The first k places of lists (B, R), padded where a list has fewer, (B, k)."""
    if item_ids.ndim != 2:
        raise ValueError(f"need item_ids (B, R), got {tuple(item_ids.shape)}")
    ids = item_ids[:, :k]
    return F.pad(ids, (0, k - ids.shape[1]))
