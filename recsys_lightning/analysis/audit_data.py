"""The leakage audit's checks of batches and counts: what training sees when held-out answers change.

They are checks of non-interference: the data are built again with other items in the place of what is held out, and
nothing that training reads may change; and beside that, training holds nothing but what a recount of the split allows.

Axis letters: U users, N interactions, I items.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recsys_lightning.analysis.audit_check import Check, verdict
from recsys_lightning.analysis.audit_split import Recount
from recsys_lightning.data.interactions import IntArray, Interactions
from recsys_lightning.data.sequences import SequenceBatch, Stage

Batch = SequenceBatch | Tensor
INPUTS = (
    "user",
    "history",
    "seen",
    "user_features",
    "rows",
)  # what a model may look at when it is asked for its answer


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
    """The training batches of an epoch are the same, whatever the held-out items are.

    Args:
        clean: the batches.
        changed: those of data in which every interaction that is not trained on is with another item.
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
        with_other_answers: the same of data in which every interaction that is not trained on is with another item.
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
