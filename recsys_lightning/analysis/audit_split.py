"""The leakage audit's check of the split: a recount by a loop over users, which shares no code with the splitters.

What the protocols themselves let through is no leak here: the k-core counts held-out interactions too, and one user's
training may lie later in time than another user's test.

Axis letters: U users, N interactions, I items.
"""

from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np

from recsys_lightning.analysis.audit_check import Check, not_checked, verdict
from recsys_lightning.data.interactions import IntArray, Interactions
from recsys_lightning.data.sequences import SequenceDataset, Stage
from recsys_lightning.data.splits import LEAVE_ONE_OUT, LeaveOneOut, Split, Splitter, UserSplit

BOUNDS = ("train_stop", "val_start", "val_stop", "test_start", "test_stop")

Places = tuple[int, int, int, int, int]  # the bounds of one user, counted from the first interaction on
Rule = Callable[[int, int], Places]  # of a user's number and the number of interactions


class Recount(NamedTuple):
    """Who is trained on what and asked for what, counted by a loop over users."""

    splitter: Splitter
    bounds: IntArray  # (5, U) positions in `Interactions`, in the order of BOUNDS
    cold: IntArray  # items that are held out of training
    closed: IntArray  # (U+1,) the bounds of each user's training once those are struck and all is closed up
    repeats: int  # users of whom an answer is also among the warm items before the first answer
    ties: int  # users whose first answer bears the time of the interaction before it: the file's order decides
    disorder: int  # users with an answer that is older than what precedes it

    @property
    def train_stop(self) -> IntArray:
        """(U,) where each user's training ends."""
        stop: IntArray = self.bounds[0]
        return stop

    @property
    def val(self) -> tuple[IntArray, IntArray]:
        """(U,) where the validation answers of each user begin and end."""
        return self.bounds[1], self.bounds[2]

    @property
    def test(self) -> tuple[IntArray, IntArray]:
        """(U,) where the test answers of each user begin and end."""
        return self.bounds[3], self.bounds[4]

    def answers(self, *stages: Literal["val", "test"]) -> IntArray:
        """Positions of all answers of these stages, user by user."""
        found = [np.arange(*bound) for stage in stages for bound in zip(*getattr(self, stage), strict=True)]
        return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *found]))

    def users(self, stage: Literal["val", "test"]) -> IntArray:
        """Users with an answer of a stage."""
        start, stop = self.val if stage == "val" else self.test
        return np.flatnonzero(stop > start)

    @property
    def num_evaluated(self) -> int:
        """Users with any answer."""
        return len(np.union1d(self.users("val"), self.users("test")))

    def untrained(self, interactions: Interactions) -> IntArray:
        """Positions of all interactions beyond the training of their users: answers, and history that is only that."""
        return np.flatnonzero(np.arange(len(interactions)) >= np.repeat(self.train_stop, interactions.lengths))


def recount(interactions: Interactions, splitter: Splitter = LEAVE_ONE_OUT, cold: IntArray | None = None) -> Recount:
    """Split interactions by a plain loop.

    Args:
        interactions: all of them.
        splitter: says by which rule; of a splitter that is not the project's own, the bounds are what it gives.
        cold: ids of items that training may not meet; None for none.
    """
    rule = _rule(splitter, interactions)
    held_out = set() if cold is None else set(cold.tolist())
    bounds: list[Places] = []
    closed = [0]
    repeats = ties = disorder = 0
    for user in range(interactions.num_users):
        begin, end = int(interactions.offsets[user]), int(interactions.offsets[user + 1])
        items, times = interactions.items[begin:end].tolist(), interactions.timestamps[begin:end].tolist()
        places = rule(user, len(items))
        train_stop, val_start, val_stop, test_start, test_stop = places
        bounds.append((begin + train_stop, begin + val_start, begin + val_stop, begin + test_start, begin + test_stop))
        closed.append(closed[-1] + sum(item not in held_out for item in items[:train_stop]))
        answers = [*range(val_start, val_stop), *range(test_start, test_stop)]
        if not answers:
            continue
        before = set(items[: answers[0]]) - held_out
        repeats += not before.isdisjoint(items[answer] for answer in answers)
        ties += answers[0] > 0 and times[answers[0] - 1] == times[answers[0]]
        newest = list(accumulate(times, max))
        disorder += any(times[answer] < newest[answer] for answer in answers)
    return Recount(
        splitter=splitter,
        bounds=np.array(bounds, dtype=np.int64).reshape(-1, len(BOUNDS)).T,
        cold=np.array(sorted(held_out), dtype=np.int64),
        closed=np.array(closed, dtype=np.int64),
        repeats=repeats,
        ties=ties,
        disorder=disorder,
    )


def _rule(splitter: Splitter, interactions: Interactions) -> Rule:
    # By the exact class: one derived from it may split by another rule.
    if type(splitter) is LeaveOneOut:
        return _leave_one_out
    if isinstance(splitter, UserSplit) and type(splitter) is UserSplit:
        return _user_split(splitter, interactions)
    split = splitter(interactions)
    found = np.stack([getattr(split, name) for name in BOUNDS]) - interactions.offsets[:-1]  # (5, U)
    return lambda user, length: tuple(found[:, user].tolist())


def _leave_one_out(user: int, length: int) -> Places:
    if length < 3:
        return length, length, length, length, length
    return length - 2, length - 2, length - 1, length - 1, length


def _user_split(splitter: UserSplit, interactions: Interactions) -> Rule:
    several = [user for user, length in enumerate(interactions.lengths.tolist()) if length > 1]
    order = [several[place] for place in np.random.default_rng(splitter.seed).permutation(len(several))]
    num_test, num_val = round(splitter.test_users * len(several)), round(splitter.val_users * len(several))
    test, val = set(order[:num_test]), set(order[num_test : num_test + num_val])
    share = Fraction(str(splitter.history))

    def rule(user: int, length: int) -> Places:
        known = min(max(int(share * length), 1), length - 1)
        if user in test:
            return 0, known, known, known, length
        if user in val:
            return 0, known, length, length, length
        return length, length, length, length, length

    return rule


def check_split(
    interactions: Interactions, counted: Recount, split: Split, rows: Mapping[Stage, SequenceDataset]
) -> Check:
    """The split, and the rows of each stage, are those of the recount.

    A splitter that is not the project's own can fail, where training reaches an answer, but it cannot pass: nothing
    says which answers it should have held out.

    Args:
        interactions: all of them.
        counted: the recount of those.
        split: what the data module made of them.
        rows: its data sets; empty for data without sequences.
    """
    first, end = interactions.offsets[:-1], interactions.offsets[1:]
    problems = []
    for name, bound in zip(BOUNDS, counted.bounds, strict=True):
        wrong = int((getattr(split, name) != bound).sum())
        if wrong:
            problems.append(f"{name} of {wrong:,} users is not where a recount puts it")
    steps = np.diff(np.vstack([first, counted.bounds, end]), axis=0)  # (6, U)
    if (steps < 0).any():
        problems.append(f"the bounds of {int((steps < 0).any(0).sum()):,} users overlap, or belong to another user")
    if counted.disorder:
        problems.append(f"{counted.disorder:,} users have a held-out answer older than what precedes it")
    for stage, dataset in rows.items():
        problems += _wrong_rows(stage, dataset, first, counted)
    figures = {
        "users": interactions.num_users,
        "evaluated": counted.num_evaluated,
        "excluded": interactions.num_users - counted.num_evaluated,
        "repeats": counted.repeats,
        "ties": counted.ties,
    }
    told = _told(counted)
    if told is None and not problems:
        name = type(counted.splitter).__name__
        reason = f"no training reaches an answer, but no recount knows which answers {name} should hold out"
        return not_checked("split", reason)
    passed = (
        f"{told}; {counted.repeats:,} have a held-out item in their own history before it (allowed); for "
        f"{counted.ties:,} the file's order decides between equal times"
    )
    return verdict("split", problems, passed, figures)


def _told(counted: Recount) -> str | None:
    """What the recount has found, in words; None if it took the bounds as they are."""
    evaluated, splitter = counted.num_evaluated, counted.splitter
    excluded = counted.bounds.shape[1] - evaluated
    if type(splitter) is LeaveOneOut:
        return (
            f"last item test, the one before it validation, the rest training, for {evaluated:,} users; {excluded:,} "
            "with fewer than 3 interactions are only trained on"
        )
    if isinstance(splitter, UserSplit) and type(splitter) is UserSplit:
        val, test = len(counted.users("val")), len(counted.users("test"))
        return (
            f"{excluded:,} users train with all their items; {val:,} others are validated and {test:,} tested, on what "
            f"comes after the first {splitter.history:.0%} of theirs, and are not trained on"
        )
    return None


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
        start, stop = counted.val if stage == "val" else counted.test
        if not np.array_equal(np.sort(user), np.flatnonzero(stop > start)):
            return [f"the {stage} rows are not one of each user with a {stage} answer"]
        problems[f"{stage} histories end beyond, or before, the answer"] = dataset.stop != start[user]
        problems[f"{stage} answers are not the held-out ones"] = dataset.answer_stop != stop[user]
    return [f"{int(wrong.sum()):,} {what}" for what, wrong in problems.items() if wrong.any()]
