"""The leakage audit's checks of data: an independent recount, and what training sees when held-out answers change.

The recount is a loop over users that knows nothing of `leave_one_out`. The second half is non-interference: the data
are built again with other items in the place of the held-out answers, and nothing that training reads may change.

What the protocol itself lets through is no leak here: the k-core counts held-out interactions too, and under
leave-one-out one user's training may lie later in time than another user's test.

Axis letters: U users, N interactions, I items, E users that are evaluated.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recsys_lightning.analysis.audit_check import Check, verdict
from recsys_lightning.data.interactions import IntArray, Interactions, Split
from recsys_lightning.data.sequences import SequenceBatch, SequenceDataset, Stage

Batch = SequenceBatch | Tensor
INPUTS = ("user", "history", "seen", "rows")  # what a model may look at when it is asked for its answer


class Recount(NamedTuple):
    """What leave-one-out makes of interactions, counted by a loop over users."""

    users: IntArray  # (E,) users with 3 interactions or more, who have a held-out answer of each kind
    validation: IntArray  # (E,) position of each one's validation answer in `Interactions`
    test: IntArray  # (E,)
    train_stop: IntArray  # (U,) where each user's training ends
    cold: IntArray  # items that are held out of training
    closed: IntArray  # (U+1,) the bounds of each user's training once those are struck and all is closed up
    repeats: int  # users of whom a held-out item is also among their own training items
    ties: int  # users whose validation answer bears the time of their last training item: the file's order decides
    disorder: int  # users with a held-out answer that is older than what precedes it


def recount(interactions: Interactions, cold: IntArray | None = None) -> Recount:
    """Split interactions by a plain loop.

    Args:
        interactions: all of them.
        cold: ids of items that training may not meet; None for none.
    """
    held_out = set() if cold is None else set(cold.tolist())
    users: list[int] = []
    validation: list[int] = []
    test: list[int] = []
    train_stop: list[int] = []
    closed = [0]
    repeats = ties = disorder = 0
    for user in range(interactions.num_users):
        begin, end = int(interactions.offsets[user]), int(interactions.offsets[user + 1])
        items, times = interactions.items[begin:end].tolist(), interactions.timestamps[begin:end].tolist()
        train_stop.append(end if len(items) < 3 else end - 2)
        trained = [item for item in items[: train_stop[-1] - begin] if item not in held_out]
        closed.append(closed[-1] + len(trained))
        if len(items) < 3:
            continue
        users.append(user)
        validation.append(end - 2)
        test.append(end - 1)
        repeats += not set(trained).isdisjoint(items[-2:])
        ties += times[-3] == times[-2]
        disorder += not max(times[:-2]) <= times[-2] <= times[-1]
    return Recount(
        users=_array(users),
        validation=_array(validation),
        test=_array(test),
        train_stop=_array(train_stop),
        cold=_array(sorted(held_out)),
        closed=_array(closed),
        repeats=repeats,
        ties=ties,
        disorder=disorder,
    )


def _array(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)


class TrainingPairs(NamedTuple):
    """Who met what in training."""

    keys: IntArray  # sorted unique ``user * (I + 1) + item``
    num_items: int  # I

    @classmethod
    def of(cls, interactions: Interactions, counted: Recount) -> "TrainingPairs":
        """The pairs of the recounted training part."""
        users = np.repeat(np.arange(interactions.num_users), interactions.lengths)  # (N,)
        is_train = np.arange(len(interactions)) < counted.train_stop[users]
        is_train &= ~np.isin(interactions.items, counted.cold)
        keys = users[is_train] * (interactions.num_items + 1) + interactions.items[is_train]
        return cls(np.unique(keys), interactions.num_items)

    def strays(self, batch: SequenceBatch) -> int:
        """Items of a batch that its users did not meet in training."""
        items = torch.cat([batch.history, batch.target, batch.seen], 1).numpy()  # (B, T)
        asked = (batch.user.numpy()[:, None] * (self.num_items + 1) + items)[items != 0]
        place = np.searchsorted(self.keys, asked).clip(
            max=len(self.keys) - 1
        )  # np.isin would sort again for every batch
        return int((self.keys[place] != asked).sum())


class TrainingRows(NamedTuple):
    """Which item embeddings training may hold."""

    known: frozenset[bytes]

    @classmethod
    def of(cls, embeddings: Tensor, cold: IntArray) -> "TrainingRows":
        """The embeddings (I+1, D) of all items but those held out; one that both kinds have is no secret."""
        warm = np.setdiff1d(np.arange(1, len(embeddings)), cold)
        return cls(frozenset(row.tobytes() for row in embeddings.numpy()[warm]))

    def strays(self, batch: Tensor) -> int:
        """Rows of a batch that are none of these embeddings."""
        return sum(row.tobytes() not in self.known for row in batch.numpy())


def scrambled(interactions: Interactions, positions: IntArray, seed: int = 0) -> Interactions:
    """The same interactions, but with another random item at each of `positions`."""
    items = np.array(interactions.items)
    step = np.random.default_rng(seed).integers(1, interactions.num_items, len(positions))
    items[positions] = (items[positions] - 1 + step) % interactions.num_items + 1
    return replace(interactions, items=items)


def check_split(
    interactions: Interactions, counted: Recount, split: Split, rows: Mapping[Stage, SequenceDataset]
) -> Check:
    """The split, and the rows of each stage, are those of the recount.

    Args:
        interactions: all of them.
        counted: the recount of those.
        split: what the data module made of them.
        rows: its data sets; empty for data without sequences.
    """
    first, end = interactions.offsets[:-1], interactions.offsets[1:]
    is_held_out = np.isin(np.arange(interactions.num_users), counted.users)
    expected = {"train_stop": counted.train_stop, "val_stop": np.where(is_held_out, end - 1, end), "test_stop": end}
    problems = []
    for name, bound in expected.items():
        wrong = int((getattr(split, name) != bound).sum())
        if wrong:
            problems.append(f"{name} of {wrong:,} users is not where a recount puts it")
    if counted.disorder:
        problems.append(f"{counted.disorder:,} users have a held-out answer older than what precedes it")
    for stage, dataset in rows.items():
        problems += _wrong_rows(stage, dataset, first, counted)
    excluded = interactions.num_users - len(counted.users)
    figures = {
        "users": interactions.num_users,
        "evaluated": len(counted.users),
        "excluded": excluded,
        "repeats": counted.repeats,
        "ties": counted.ties,
    }
    passed = (
        f"last item test, the one before it validation, the rest training, for {len(counted.users):,} users; "
        f"{excluded:,} with fewer than 3 interactions are only trained on; {counted.repeats:,} have a held-out item "
        f"in their own training history (allowed); for {counted.ties:,} the file's order decides between equal times"
    )
    return verdict("split", problems, passed, figures)


def _wrong_rows(stage: Stage, dataset: SequenceDataset, first: IntArray, counted: Recount) -> list[str]:
    """What is wrong with the rows of one stage."""
    user, closes_up = dataset.user, stage == "train" and len(counted.cold) > 0
    own = (counted.closed[:-1] if closes_up else first)[user]
    problems = {f"{stage} rows reach into another user": (dataset.first < own) | (dataset.start < own)}
    if stage == "train":
        reach = np.maximum(dataset.stop, dataset.answer_stop)
        end = counted.closed[1:] if closes_up else counted.train_stop
        problems["train rows reach a held-out position"] = reach > end[user]
    elif stage in ("val", "test"):
        answer = np.full(len(first), -1, dtype=np.int64)
        answer[counted.users] = counted.validation if stage == "val" else counted.test
        if not np.array_equal(np.sort(user), counted.users):
            return [f"the {stage} rows are not one of each user with 3 interactions or more"]
        problems[f"{stage} histories end beyond, or before, the answer"] = dataset.stop != answer[user]
        problems[f"{stage} answers are not the held-out ones"] = dataset.answer_stop != answer[user] + 1
    return [f"{int(wrong.sum()):,} {what}" for what, wrong in problems.items() if wrong.any()]


def check_scrambling(clean: Iterable[Batch], changed: Iterable[Batch]) -> Check:
    """Control: other answers reach the evaluation batches, or no comparison of batches could fail.

    Args:
        clean: validation and test batches.
        changed: the same of data in which every answer is another item.
    """
    answers = same = 0
    for one, other in zip(clean, changed, strict=True):
        if isinstance(one, SequenceBatch) and isinstance(other, SequenceBatch):
            real = one.target != 0
            answers += int(real.sum())
            # Of another shape: nothing says which answer is which.
            alike = (one.target == other.target) if one.target.shape == other.target.shape else real
            same += int((alike & real).sum())
    problems = [f"{same:,} of {answers:,} evaluated answers are no held-out items"] if same or not answers else []
    passed = f"control: other held-out items change all {answers:,} validation and test answers"
    return verdict("scrambling", problems, passed, {"answers": answers, "unchanged": same})


def check_train_batches(
    clean: Iterable[Batch],
    changed: Iterable[Batch],
    known: TrainingPairs | TrainingRows | None,
    name: str = "training batches",
) -> Check:
    """The training batches of an epoch are the same, whatever the held-out answers are.

    Args:
        clean: the batches.
        changed: those of data in which every held-out answer is another item.
        known: who met what in training, for batches of sequences; which embeddings may be learned from, for batches of
            those; None leaves it unchecked. Items that are held out of training are in neither.
        name: of the check.
    """
    found = compared(clean, changed)
    problems = [f"with other held-out items, {line}" for line in found.differences()]
    # Comparing cannot see data that stay the same because they come from elsewhere.
    if isinstance(known, TrainingPairs):
        strays = sum(known.strays(batch) for batch in clean if isinstance(batch, SequenceBatch))
        if strays:
            problems.append(f"they hold {strays:,} items that are in no training part of their user")
    elif known is not None:
        strays = sum(known.strays(batch) for batch in clean if isinstance(batch, Tensor))
        if strays:
            problems.append(f"they hold {strays:,} embeddings that are of no item that may be learned from")
    passed = f"{found.batches:,} batches of {found.rows:,} rows do not change with the held-out items"
    return verdict(name, problems, passed, {"batches": found.batches, "rows": found.rows})


def check_evaluation(
    clean: Mapping[Stage, Iterable[Batch]], both: Mapping[Stage, Iterable[Batch]], test: Mapping[Stage, Iterable[Batch]]
) -> Check:
    """Validation knows no test answer, and no evaluation is told its own answer.

    Args:
        clean: batches of ``val`` and ``test``.
        both: the same, of data in which all held-out answers are other items.
        test: the same, of data in which the test answers are.
    """
    known = {
        "validation batches, with other test items": compared(clean["val"], test["val"]),
        "validation inputs, with other answers": compared(clean["val"], both["val"], INPUTS),
        "test inputs, with other answers": compared(clean["test"], test["test"], INPUTS),
    }
    problems = [f"{what}: {line}" for what, found in known.items() for line in found.differences()]
    rows = known["validation batches, with other test items"].rows
    passed = f"{rows:,} validation rows do not change with the test items, and no input changes with its own answer"
    return verdict("evaluation", problems, passed, {"rows": rows})


def check_item_statistics(
    interactions: Interactions, counted: Recount, counts: IntArray, with_other_answers: IntArray
) -> Check:
    """The catalogue counts training interactions only.

    Args:
        interactions: all of them.
        counted: the recount of those.
        counts: (I+1,) the catalogue's ``train_counts``.
        with_other_answers: the same of data in which every held-out answer is another item.
    """
    expected = np.zeros(interactions.num_items + 1, dtype=np.int64)
    for begin, stop in zip(interactions.offsets[:-1], counted.train_stop, strict=True):
        np.add.at(expected, interactions.items[begin:stop], 1)
    expected[counted.cold] = 0
    problems = []
    if not np.array_equal(counts, expected):
        wrong = int((counts != expected).sum())
        problems.append(
            f"{wrong:,} item counts are not those of training: they sum to {counts.sum():,}, "
            f"training has {expected.sum():,} interactions"
        )
    if not np.array_equal(counts, with_other_answers):
        problems.append(f"{int((counts != with_other_answers).sum()):,} item counts change with the held-out items")
    passed = f"train_counts are a recount of {expected.sum():,} training interactions and no others"
    return verdict("item statistics", problems, passed, {"training_interactions": int(expected.sum())})


class Compared(NamedTuple):
    """Two sequences of batches side by side."""

    batches: int
    rows: int
    differing: dict[str, int]  # field: batches in which it differs
    missing: int  # batches that only one of the two has

    def differences(self) -> list[str]:
        """A line a field that differs."""
        lines = [f"{name} differs in {count:,} of {self.batches:,} batches" for name, count in self.differing.items()]
        return lines + ([f"{self.missing:,} batches more or fewer"] if self.missing else [])


def compared(clean: Iterable[Batch], changed: Iterable[Batch], names: Iterable[str] | None = None) -> Compared:
    """Compare batches bit by bit, all their fields or those named."""
    batches = rows = missing = 0
    differing: dict[str, int] = {}
    wanted = None if names is None else set(names)
    for one, other in zip_longest(clean, changed):
        batches += 1
        if one is None or other is None:
            missing += 1
            continue
        rows += len(one)
        others = dict(_parts(other))
        for name, part in _parts(one):
            if (wanted is None or name in wanted) and not torch.equal(part, others[name]):
                differing[name] = differing.get(name, 0) + 1
    return Compared(batches, rows, differing, missing)


def _parts(batch: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(batch, Tensor):
        yield "rows", batch
    else:
        yield from ((field.name, getattr(batch, field.name)) for field in fields(batch))
