"""Which interactions are learned from and which are the answers: splits by user or by position, and cold items.

Axis letters: U users, I items, N interactions.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from recsys_lightning.data.interactions import IntArray, Interactions
from recsys_lightning.errors import InputError


def draw_cold(num_items: int, share: float, seed: int) -> IntArray:
    """Ids, ascending, of the items that are held out of training: a function of these three numbers and nothing else.

    A larger share holds the items of a smaller one and more.

    Args:
        num_items: I.
        share: of the items, rounded to whole ones; 0 draws none.
        seed: of the draw, 0 or more.

    Raises:
        InputError: the share is not in 0..<1, or is of no item or of all.
    """
    if not 0 <= share < 1:
        raise InputError(f"data.cold_items={share} must be a share of the items, from 0 to less than 1")
    count = round(share * num_items)
    if share and count == 0:
        raise InputError(f"data.cold_items={share} of {num_items:,} items is not even one; raise it")
    if count == num_items > 0:
        raise InputError(f"data.cold_items={share} of {num_items:,} items leaves none to train on; lower it")
    return np.sort(np.random.default_rng(seed).permutation(num_items)[:count] + 1)


def _none() -> IntArray:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Split:
    """Which interactions may be learned from, and which are the answers.

    All bounds are row positions in `Interactions`, one a user, and none is below the one before it. A user trains on
    ``offsets[u]:train_stop[u]``, less the interactions with items of `cold`. The validation answers are
    ``val_start[u]:val_stop[u]`` and all that stands before them is their history; the same holds of the test answers,
    ``test_start[u]:test_stop[u]``. Equal bounds mean nothing to train on, or no answer: a user without one is left out
    of that evaluation.

    Attributes:
        train_stop: (U,).
        val_start: (U,).
        val_stop: (U,).
        test_start: (U,).
        test_stop: (U,).
        cold: ids, ascending, of items that are struck from training and from nothing else.
    """

    train_stop: IntArray
    val_start: IntArray
    val_stop: IntArray
    test_start: IntArray
    test_stop: IntArray
    cold: IntArray = field(default_factory=_none)

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of validation and of test answers."""
        return int((self.val_stop - self.val_start).sum()), int((self.test_stop - self.test_start).sum())


class TrainingPart(NamedTuple):
    """What users may be learned from: user u owns ``items[first[u]:stop[u]]``, oldest first; it may be empty."""

    items: IntArray
    first: IntArray  # (U,)
    stop: IntArray  # (U,)

    def counts(self, num_items: int) -> IntArray:
        """(I+1,) how often each item is met in training; index 0, padding, is 0."""
        edges = np.zeros(len(self.items) + 1, dtype=np.int64)
        np.add.at(edges, self.first, 1)
        np.add.at(edges, self.stop, -1)
        counts = np.bincount(self.items[edges.cumsum()[:-1] > 0], minlength=num_items + 1)
        return counts.astype(np.int64)


def training_part(interactions: Interactions, split: Split) -> TrainingPart:
    """The training interactions of each user, closed up over those with cold items.

    Without cold items they are the arrays of `interactions` themselves, which are memory-mapped; else a copy.
    """
    first, stop = interactions.offsets[:-1], split.train_stop
    if not len(split.cold):
        return TrainingPart(interactions.items, first, stop)
    row = np.arange(len(interactions))
    is_cold = np.zeros(interactions.num_items + 1, dtype=np.bool_)
    is_cold[split.cold] = True
    kept = (row < np.repeat(stop, interactions.lengths)) & ~is_cold[interactions.items]  # (N,)
    before = np.concatenate([[0], np.cumsum(kept)])  # (N+1,) interactions kept before each row
    return TrainingPart(interactions.items[kept], before[first], before[interactions.offsets[1:]])


class Splitter(ABC):
    """A rule that splits interactions; plain settings, of which the same interactions get the same split.

    A splitter of your own is used like those of this file, but `recsys audit` cannot say whether its split is the one
    that you meant.
    """

    @abstractmethod
    def __call__(self, interactions: Interactions) -> Split:
        """The split, without cold items."""


@dataclass(frozen=True)
class LeaveOneOut(Splitter):
    """The last item of each user is the test answer, the one before it the validation answer, the rest is training.

    At test time the validation item belongs to the history (papers of this field agree: C13). A user needs 3
    interactions to be evaluated; one with fewer is trained on and never evaluated.
    """

    def __call__(self, interactions: Interactions) -> Split:
        """The split."""
        stop = np.array(interactions.offsets[1:])
        held_out = np.where(interactions.lengths >= 3, 1, 0)
        train, test = stop - 2 * held_out, stop - held_out
        return Split(train_stop=train, val_start=train, val_stop=test, test_start=test, test_stop=stop)


LEAVE_ONE_OUT = LeaveOneOut()


@dataclass(frozen=True)
class UserSplit(Splitter):
    """Users are drawn for training, validation and test: the protocol of ComiRec (arXiv:2005.09347; S16).

    A training user is trained on with all interactions and never evaluated. Of the n interactions of a validation or
    test user the first ``floor(history * n)``, but at least 1 and at most n - 1, are the history, and all others are
    the answers; none of either is learned from or counted as popularity. A user with one interaction can have no
    answer, so is not drawn but trained on. The draw follows from the seed, the shares and the number of other users.

    Args:
        val_users: share of the users with 2 interactions or more, rounded to whole users.
        test_users: the same for the test.
        history: share of a held-out user's interactions.
        seed: of the draw, 0 or more; not the seed of the run, so that runs of several seeds have the same answers.
    """

    val_users: float = 0.1
    test_users: float = 0.1
    history: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("val_users", "test_users", "history"):
            if not 0 < (value := getattr(self, name)) < 1:
                raise InputError(f"data.split.{name}={value} must be a share: more than 0 and less than 1")
        if self.val_users + self.test_users >= 1:
            shares = f"data.split.val_users={self.val_users} and test_users={self.test_users}"
            raise InputError(f"{shares} leave no user to train on: together they must be less than 1")
        if self.seed < 0:
            raise InputError(f"data.split.seed={self.seed} must be 0 or more")

    def __call__(self, interactions: Interactions) -> Split:
        """The split.

        Raises:
            InputError: there are so few users that one of the three parts is empty.
        """
        first, stop, lengths = interactions.offsets[:-1], interactions.offsets[1:], interactions.lengths
        eligible = np.flatnonzero(lengths >= 2)
        num_val, num_test = (round(share * len(eligible)) for share in (self.val_users, self.test_users))
        for part, count in {"val": num_val, "test": num_test, "train": len(eligible) - num_val - num_test}.items():
            if count < 1:
                raise InputError(
                    f"data.split: {self} leaves no user for {part} of the {len(eligible):,} with 2 interactions or "
                    "more; change its shares, lower --data.k_core or give more data"
                )
        drawn = eligible[np.random.default_rng(self.seed).permutation(len(eligible))]
        held_out, val = drawn[: num_test + num_val], drawn[num_test : num_test + num_val]
        # 0.29 * 100 is a little below 29: round away what binary fractions add or lack.
        known = np.floor(np.round(self.history * lengths[held_out], 6)).astype(np.int64)
        train_stop, answers = np.array(stop), np.array(stop)  # (U,)
        train_stop[held_out] = first[held_out]
        answers[held_out] = first[held_out] + known.clip(1, lengths[held_out] - 1)
        val_stop, test_start = np.array(answers), np.array(answers)
        val_stop[val] = test_start[val] = stop[val]
        return Split(train_stop, answers, val_stop, test_start, np.array(stop))
