"""Histories and their answers as padded batches, cut out of CSR arrays by vectorised indexing.

Axis letters: B rows, T time, N answers, S items seen, F user features.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from recsys_lightning.data.interactions import IntArray, Interactions
from recsys_lightning.data.splits import Split, training_part
from recsys_lightning.data.users import UserFeatures
from recsys_lightning.errors import InputError

Stage = Literal["train", "val", "test", "predict"]


def _no_features() -> Tensor:
    return torch.empty(0, 0, dtype=torch.int64)


@dataclass(frozen=True)
class SequenceBatch:
    """Users' histories with the items that came next.

    Attributes:
        user: (B,) user number.
        history: (B, T) item ids, oldest first, padded with 0 on the right.
        target: (B, N) the answers, padded with 0 on the right; N is 1 under leave-one-out, that of the user with the
            most answers under a user split, 0 when predicting.
        seen: (B, S) every item the user met before the answers, also those older than `history`; padded with 0. Empty
            (S = 0) in training.
        user_features: (B, F) codes of the users, see `UserFeatures`; (B, 0) where the data have none.
    """

    user: Tensor
    history: Tensor
    target: Tensor
    seen: Tensor
    user_features: Tensor = field(default_factory=_no_features)

    def __post_init__(self) -> None:
        if not self.user_features.shape[1]:  # no table to be of another number of rows, or on another device
            object.__setattr__(self, "user_features", self.user.new_zeros(len(self.user), 0))

    @property
    def history_mask(self) -> Tensor:
        """(B, T) True where `history` holds an item."""
        return self.history != 0

    @property
    def sequence(self) -> Tensor:
        """(B, T+1) the history and, where there is one, the first answer after it: what next-item models learn from."""
        if not self.target.shape[1]:
            return self.history
        lengths = self.history_mask.sum(1, keepdim=True)  # (B, 1)
        return F.pad(self.history, (0, 1)).scatter(1, lengths, self.target[:, :1])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SequenceBatch":
        """The same batch on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return SequenceBatch(**{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()})

    def pin_memory(self) -> "SequenceBatch":
        """The same batch in page-locked memory."""
        return SequenceBatch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    def __len__(self) -> int:
        return len(self.user)


class SequenceDataset(Dataset[SequenceBatch]):
    """Rows of a split; indexing by an array of rows gives a `SequenceBatch` at once.

    Training rows follow C14: one sequence a user, on which every position is learned. A user with more than
    ``max_history + 1`` training items is either cut to the newest ones (``windows="last"``) or split from the newest
    backwards into sequences that overlap by one item (``windows="all"``): each training item of a user but his first is
    then an answer exactly once, and each but his last stands in exactly one history. Items that the split holds out of
    training are in no training row: a sequence closes up over them.

    Args:
        interactions: all interactions.
        split: what is training, validation and test.
        stage: ``train``, ``val``, ``test``, or ``predict`` (the whole sequence is history, there is no answer).
        max_history: longest history T.
        windows: what becomes of training sequences longer than that.
        user_features: of all users; None where the data have none.
    """

    def __init__(
        self,
        interactions: Interactions,
        split: Split,
        stage: Stage,
        max_history: int = 20,
        windows: Literal["last", "all"] = "last",
        user_features: UserFeatures | None = None,
    ):
        if max_history < 1:
            raise ValueError(f"max_history={max_history} must be at least 1")
        self.user_features = user_features
        self.items, first = interactions.items, interactions.offsets[:-1]
        self.with_seen = stage != "train"
        if stage == "train":
            self.items, first, end = training_part(interactions, split)
            # The answer of a training row is its last item; at least one item must stand before it.
            user = np.flatnonzero(end - first >= 2)
            stop, answer_stop = end[user] - 1, end[user]
            if windows == "all":
                user, stop = _windows_backwards(user, first[user], stop, max_history)
                answer_stop = stop + 1
        else:
            end = interactions.offsets[1:]
            start, last = {
                "val": (split.val_start, split.val_stop),
                "test": (split.test_start, split.test_stop),
                "predict": (end, end),
            }[stage]
            user = np.flatnonzero((start > first) & ((last > start) | (stage == "predict")))
            stop, answer_stop = start[user], last[user]
        self.user, self.stop, self.answer_stop = user, stop, answer_stop
        self.first = first[user]
        self.start = np.maximum(self.first, stop - max_history)

    def __len__(self) -> int:
        return len(self.user)

    @property
    def lengths(self) -> IntArray:
        """(rows,) items that a batch of the row is padded to: its history, in evaluation all that the user has seen."""
        return self.stop - (self.first if self.with_seen else self.start)

    def fingerprint(self) -> str:
        """SHA-256, in hex, of what these rows are: their users, the bounds of each, and the items that they gather.

        It does not depend on batches or their order, and not on interactions that no row reaches.
        """
        begin = self.first if self.with_seen else self.start
        edges = np.zeros(len(self.items) + 1, dtype=np.int64)
        np.add.at(edges, begin, 1)
        np.add.at(edges, self.answer_stop, -1)
        reached = self.items[edges.cumsum()[:-1] > 0]
        digest = hashlib.sha256()
        arrays = [self.user, begin, self.start, self.stop, self.answer_stop, reached]
        if self.user_features is not None:
            arrays.append(self.user_features.codes[self.user])
        for array in arrays:
            digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def __getitem__(self, rows: IntArray | list[int]) -> SequenceBatch:
        rows = np.asarray(rows)
        user, start, stop = self.user[rows], self.start[rows], self.stop[rows]
        codes = None if self.user_features is None else torch.from_numpy(self.user_features.codes[user])
        return SequenceBatch(
            user=torch.from_numpy(user),
            history=self._gather(start, stop),
            target=self._gather(stop, self.answer_stop[rows]),
            seen=self._gather(self.first[rows], stop if self.with_seen else self.first[rows]),
            user_features=_no_features() if codes is None else codes,
        )

    def _gather(self, start: IntArray, stop: IntArray) -> Tensor:
        """(B, longest) the items between `start` and `stop`, 0 after the end."""
        steps = np.arange((stop - start).max(initial=0))
        position = start[:, None] + steps  # (B, longest)
        inside = position < stop[:, None]
        return torch.from_numpy(np.where(inside, self.items[np.where(inside, position, 0)], 0))


def _windows_backwards(user: IntArray, first: IntArray, stop: IntArray, width: int) -> tuple[IntArray, IntArray]:
    """Split ``first:stop`` into histories of at most `width`, newest first; returns the user and stop of each."""
    count = -(-(stop - first) // width)  # at least 1, since a row has a history
    row = np.repeat(np.arange(len(user)), count)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    return user[row], stop[row] - nth * width


class BucketSampler(Sampler[list[int]]):
    """Batches of rows of like length, so that little of a batch is padding.

    The order is a pure function of ``(seed, epoch)``: rows are shuffled, sorted by length within pools of
    `pool_batches` batches (a stable sort, so equal lengths stay shuffled), cut into batches, and the batches are
    shuffled. So a training may go on within an epoch (`resume_at`). Without `shuffle`, rows are sorted by length once,
    longest first.

    Ranks share out whole rows of each global batch, ``rank::world_size``, and no row is dropped or repeated. The last
    global batch goes short; were it too short for every rank to have a row, it is joined to the one before, whose ranks
    then have one row more than `batch_size` at most. So all ranks have the same number of batches and none is empty:
    a rank that stopped early, or had nothing to do, would leave the others waiting for it.

    Args:
        lengths: (rows,) the length of each row, as many as there are ranks at least.
        batch_size: rows of a batch on one rank.
        shuffle: training order; evaluation leaves it off.
        seed: of the shuffle, 0 or more.
        pool_batches: batches sorted together; more means less padding and less randomness.
        rank: this process.
        world_size: number of processes.

    Raises:
        InputError: there are fewer rows than processes.
    """

    def __init__(
        self,
        lengths: IntArray,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        pool_batches: int = 50,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be in 0..{world_size - 1}")
        if len(lengths) < world_size:
            raise InputError(
                f"{len(lengths)} rows cannot be shared out among {world_size} processes; use fewer --trainer.devices"
            )
        self.lengths, self.batch_size, self.shuffle, self.seed = lengths, batch_size, shuffle, seed
        self.pool_batches, self.rank, self.world_size = pool_batches, rank, world_size
        self.epoch = 0
        self._resumed_epoch, self._done_batches = -1, 0

    def resume_at(self, epoch: int, done_batches: int) -> None:
        """Go on in `epoch`, of which so many batches are done: in that one epoch they are left out."""
        self.epoch = self._resumed_epoch = epoch
        self._done_batches = done_batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`; Lightning calls this before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._bounds())

    def _bounds(self) -> list[tuple[int, int]]:
        total, step = len(self.lengths), self.batch_size * self.world_size
        starts = list(range(0, total, step))
        if len(starts) > 1 and total - starts[-1] < self.world_size:
            starts.pop()
        return list(zip(starts, [*starts[1:], total], strict=True))

    def __iter__(self) -> Iterator[list[int]]:
        bounds = self._bounds()
        if self.shuffle:
            rng = np.random.default_rng([self.seed, self.epoch])
            order = rng.permutation(len(self.lengths))
            pool = self.pool_batches * self.batch_size * self.world_size
            for begin in range(0, len(order), pool):
                part = order[begin : begin + pool]
                order[begin : begin + pool] = part[np.argsort(-self.lengths[part], kind="stable")]
            bounds = [bounds[i] for i in rng.permutation(len(bounds))]
        else:
            order = np.argsort(-self.lengths, kind="stable")
        done = self._done_batches if self.epoch == self._resumed_epoch else 0
        for begin, end in bounds[done:]:
            yield order[begin:end][self.rank :: self.world_size].tolist()
