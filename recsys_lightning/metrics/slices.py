"""Any ranking metric for a part of the answers: popular, rare and new items, users with little history.

Shapes: B users of a batch, N answers of a user, U users and I items of the data set. Item id 0 is padding.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from recsys_lightning.errors import InputError
from recsys_lightning.metrics.ranks import TargetRanks
from recsys_lightning.metrics.states import SummedMetric

ANSWERS_AT_ONCE = 2**16


def item_slices(train_counts: Tensor, cuts: tuple[float, float] = (0.2, 0.5)) -> dict[str, Tensor]:
    """The items by how often training met them, as (I+1,) bool masks; False at padding.

    * ``head``: the share ``cuts[0]`` of the items that training met most; equal counts keep id order.
    * ``tail``: all others, as papers count it (S14).
    * ``mid``: the part of the tail that is within the share ``cuts[1]``.
    * ``cold-item``: never in training.

    Args:
        train_counts: (I+1,) interactions of each item in training; index 0 is padding.
        cuts: shares of the catalogue, 0 < cuts[0] < cuts[1] < 1.

    Raises:
        InputError: the cuts are not such shares.
    """
    if len(cuts) != 2 or not 0 < cuts[0] < cuts[1] < 1:
        raise InputError(f"item slices need two cuts with 0 < first < second < 1, got {list(cuts)}")
    num_items = len(train_counts) - 1
    order = train_counts[1:].argsort(descending=True, stable=True) + 1  # (I,)
    first, second = (round(cut * num_items) for cut in cuts)
    head, mid, tail = (torch.zeros(num_items + 1, dtype=torch.bool, device=train_counts.device) for _ in range(3))
    head[order[:first]], mid[order[first:second]], tail[order[first:]] = True, True, True
    cold = train_counts == 0
    cold[0] = False
    return {"head": head, "mid": mid, "tail": tail, "cold-item": cold}


def user_slices(lengths: Tensor, at_most: int = 10) -> dict[str, Tensor]:
    """``cold-user``: the users with at most so many interactions in the whole data set, as a (U,) bool mask.

    Args:
        lengths: (U,) interactions of each user, those of validation and test included.
        at_most: the longest that still counts as cold.
    """
    return {"cold-user": lengths <= at_most}


class SlicedMetrics(nn.Module):
    """A collection of ranking metrics over all answers, and a clone of it for each slice.

    A slice of items counts the answers that lie in it: an answer outside is one more wrong item, and users without an
    answer inside are left out. A slice of users counts those users. Slices may overlap.

    Batches are gathered and counted some ten thousand answers at a time: the cost of a metric's update lies in the
    calls, not in the users.

    Args:
        metrics: updated with `TargetRanks`, e.g. from `ranking_metrics`.
        item_slices: (I+1,) bool masks by name.
        user_slices: (U,) bool masks by name.

    Raises:
        ValueError: a name is used twice.
    """

    def __init__(
        self,
        metrics: MetricCollection,
        item_slices: Mapping[str, Tensor] | None = None,
        user_slices: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        masks = {"item": dict(item_slices or {}), "user": dict(user_slices or {})}
        if both := masks["item"].keys() & masks["user"].keys():
            raise ValueError(f"slices of items and of users share the names {sorted(both)}")
        self._item_slices, self._user_slices = tuple(masks["item"]), tuple(masks["user"])
        for kind, named in masks.items():
            for name, mask in named.items():
                self.register_buffer(_buffer(kind, name), mask, persistent=False)
        self.all = metrics.clone()
        self.slices = nn.ModuleDict({name: metrics.clone() for name in (*self._item_slices, *self._user_slices)})
        self.counts = _UserCounts(len(self.slices))
        self._waiting: list[tuple[TargetRanks, Tensor, Tensor]] = []

    def update(self, ranks: TargetRanks, target: Tensor, user: Tensor) -> None:
        """Add the users of a batch.

        Args:
            ranks: of the answers.
            target: (B, N) the answers' item ids, 0 = padding.
            user: (B,) numbers of the users, 0 .. U-1.

        Raises:
            ValueError: the shapes do not fit.
        """
        if target.shape != ranks.relevant.shape or user.shape != target.shape[:1]:
            shapes = [tuple(tensor.shape) for tensor in (ranks.relevant, target, user)]
            raise ValueError(f"need ranks (B, N), target (B, N) and user (B,), got {shapes}")
        self._waiting.append((ranks, target, user))
        if sum(answers.numel() for _, answers, _ in self._waiting) >= ANSWERS_AT_ONCE:
            self._count()

    def compute(self) -> dict[str, Tensor]:
        """Every metric over all users and over those of each slice, e.g. ``recall@10`` and ``tail/recall@10``.

        Beside them ``users`` and ``tail/users``, the users that were counted, and ``users_without_answer``, those that
        could not be because they have no answer at all. The metrics of a slice without users are left out.
        """
        self._count()
        num_users, without_answer = self.counts.compute()
        values = {"users": num_users[0], "users_without_answer": without_answer}
        # Every rank computes every metric, users or not: to compute is to meet the other ranks.
        everything = self.all.compute()
        if num_users[0] > 0:
            values |= everything
        for number, name in zip(num_users[1:], self.slices, strict=True):
            values[f"{name}/users"] = number
            sliced = self._slice(name).compute()
            if number > 0:
                values |= {f"{name}/{metric}": value for metric, value in sliced.items()}
        return values

    def reset(self) -> None:
        """Forget all users."""
        self._waiting.clear()
        for metrics in (self.all, *map(self._slice, self.slices)):
            metrics.reset()
        self.counts.reset()

    def _count(self) -> None:
        """Count the batches that wait."""
        if not self._waiting:
            return
        batches, targets, users = zip(*self._waiting, strict=True)
        self._waiting.clear()
        ranks = TargetRanks(*(_stack(parts) for parts in zip(*batches, strict=True)))
        target, user = _stack(targets), torch.cat(users)
        masks = {name: self.get_buffer(_buffer("item", name))[target] for name in self._item_slices}
        for name in self._user_slices:
            masks[name] = self.get_buffer(_buffer("user", name))[user][:, None].expand_as(target)
        self.all.update(ranks)
        counted = [ranks.relevant]
        for name, mask in masks.items():
            sliced = ranks.only(mask)
            self._slice(name).update(sliced)
            counted.append(sliced.relevant)
        self.counts.update(counted)

    def _slice(self, name: str) -> MetricCollection:
        metrics = self.slices[name]
        assert isinstance(metrics, MetricCollection)  # noqa: S101 - the dict holds nothing else
        return metrics


class _UserCounts(SummedMetric):
    """How many users have an answer, of all and of each slice, and how many have none at all."""

    num_users: Tensor  # (1 + slices,) long
    without_answer: Tensor  # () long

    def __init__(self, num_slices: int) -> None:
        super().__init__()
        self.add_sum("num_users", 1 + num_slices, dtype=torch.long)
        self.add_sum("without_answer", dtype=torch.long)

    def update(self, counted: list[Tensor]) -> None:
        """Add a batch: which answers count, (B, N) bool, for all users and then for each slice."""
        number = torch.stack([answers.any(1).sum() for answers in counted])
        self.num_users += number
        self.without_answer += len(counted[0]) - number[0]

    def compute(self) -> tuple[list[Tensor], Tensor]:
        return list(self.num_users), self.without_answer  # a list: torchmetrics makes a number of a (1,) tensor


def _buffer(kind: str, name: str) -> str:
    return f"{kind}_slice_{name}"


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Rows of (B, N) tables of different N below each other, padded with zeros at the end."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])
