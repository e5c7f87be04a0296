"""What more interests a user find and cost, and whether the interest tower names the right ones.

SPARC (arXiv:2508.09090) searches with the K most probable level-1 codes; S18 asks for the accuracy and the calibration
of what says how probable they are.
Axis letters: B rows (users), U users, K interests, C codes of level 1, N answers of a user, I items.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from recsys_lightning.analysis.groups import Score
from recsys_lightning.analysis.latency_timing import Search, time_in_turns
from recsys_lightning.analysis.study_run import Progress, StudiedRun, Users, draw_users
from recsys_lightning.analysis.study_sparc import Stage, Values, groups_of, level1_codes, measure, over_seeds
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.errors import InputError
from recsys_lightning.metrics.calibration import Reliability, reliability
from recsys_lightning.models.sparc import SPARC, SparcSearch
from recsys_lightning.retrieval.index import ItemIndex

NUMBERS = (1, 2, 4, 8, 16, 32, 64)
_LIMIT_S = 120.0  # of all counted calls of one number of interests


@dataclass(frozen=True, kw_only=True)
class InterestGrid:
    """What is tried.

    Attributes:
        numbers: of interests K; None takes those of `NUMBERS` that the codebook allows, and the run's own.
        k: places over which everything is measured.
        stage: ``val`` or ``test``.
        users: to draw; None takes all.
        calls: of which the cost is the median.
        seed: of the draw.

    Raises:
        InputError: numbers that are empty, repeat or cannot be.
    """

    numbers: tuple[int, ...] | None = None
    k: int = 50
    stage: Stage = "val"
    users: int | None = None
    calls: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        given = self.numbers
        if given is not None and (not given or len(set(given)) < len(given) or min(given) < 1):
            raise InputError(f"--numbers {' '.join(map(str, given))}: need different values of 1 or more")
        if self.k < 1 or self.calls < 1:
            raise InputError(f"--k {self.k} and --calls {self.calls} must be at least 1")

    @property
    def batch_calls(self) -> int:
        """Calls of whole batches of which the cost is the median: a tenth, but 3 at least."""
        return max(3, self.calls // 10)


class Tower(NamedTuple):
    """What the interest tower says of the users that have an answer.

    Attributes:
        share: (U, C) share of a user's answers whose code is among the first 1 .. C of the tower.
        popular: (U, C) the same of the codes most met in training.
        claimed: (U, C) probability, at temperature 1, that the tower gives to its first 1 .. C codes together.
    """

    share: Tensor
    popular: Tensor
    claimed: Tensor

    def values(self, number: int) -> Values:
        """Accuracy and calibration error of the first `number` codes."""
        return {
            "accuracy": float(self.share[:, number - 1].mean()),
            "popular": float(self.popular[:, number - 1].mean()),
            "ece": self.bins(number).error(),
        }

    def bins(self, number: int) -> Reliability:
        """How often the answer is among the first `number` codes, by how probable the tower says it is."""
        return reliability(self.claimed[:, number - 1].clamp(max=1.0), self.share[:, number - 1])


class InterestRow(NamedTuple):
    """What a number of interests reached in runs that differ in their seed alone."""

    group: str
    number: int
    own: bool  # the runs' own number
    num_codes: int  # C
    scores: dict[str, Score]


class InterestsFound(NamedTuple):
    """What the study has found."""

    rows: list[InterestRow]
    reliability: dict[str, Reliability]  # of the first run of each group, at its own number of interests


def interest_tower(run: StudiedRun[SPARC], users: Users, progress: Progress) -> Tower:
    """Ask the interest tower of a run for every user, and compare with the level-1 codes of the answers.

    Raises:
        InputError: the model has no codes yet, or no user has an answer.
    """
    model = run.model
    with torch.inference_mode():
        codes = level1_codes(run)  # (I+1,)
        met = torch.as_tensor(run.data.catalog.train_counts).to(run.device)  # (I+1,)
        num_codes = run.model.quantizer.num_codes
        mass = met.new_zeros(num_codes).index_add_(0, codes[1:], met[1:])  # (C,) training interactions
        popular = mass.argsort(descending=True, stable=True)  # (C,)
        parts: list[tuple[Tensor, ...]] = []
        for number, batch in enumerate(users.batches):
            progress(f"{run.name}: interests", number, len(users.batches))
            batch = batch.to(run.device)
            batch_codes = codes[batch.target]  # (B, N)
            answered = batch.target > 0
            probability, order = model.interest_logits(batch).double().softmax(-1).sort(descending=True, stable=True)
            kept = answered.any(1)
            own, favourite = (
                _share_within(ranked, batch_codes, answered) for ranked in (order, popular.expand_as(order))
            )
            parts.append(tuple(part[kept] for part in (own, favourite, probability.cumsum(1))))
        progress(f"{run.name}: interests", len(users.batches), len(users.batches))
    share, favourite, claimed = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    if not len(share):
        raise InputError(f"{run.name}: no user has an answer")
    return Tower(share, favourite, claimed)


def _share_within(order: Tensor, codes: Tensor, answered: Tensor) -> Tensor:
    """(B, C) share of a user's answers whose codes (B, N) are among the first 1 .. C of an order (B, C)."""
    place = order.argsort(1).gather(1, codes)  # (B, N) from 0
    hits = torch.zeros_like(order, dtype=torch.double).scatter_add_(1, place, answered.double())  # (B, C)
    return hits.cumsum(1) / answered.sum(1, keepdim=True).clamp(min=1)


def numbers_of(run: StudiedRun[SPARC], grid: InterestGrid) -> list[int]:
    """The numbers of interests that are tried, in rising order.

    Raises:
        InputError: one is above the number of codes.
    """
    num_codes = run.model.quantizer.num_codes
    if grid.numbers is None:
        return sorted({*(number for number in NUMBERS if number <= num_codes), run.model.search.num_interests})
    if max(grid.numbers) > num_codes:
        raise InputError(f"--numbers {max(grid.numbers)}: {run.name} has {num_codes} codes at level 1")
    return sorted(grid.numbers)


def costs(
    run: StudiedRun[SPARC], searches: Sequence[SparcSearch], grid: InterestGrid, progress: Progress
) -> list[Values]:
    """Milliseconds a user of each setting: ``ms``, asked alone, and ``batch_ms``, in batches as in evaluation.

    On a CPU these are CPU time of one thread; on a GPU the time until the answer is there. A call makes the whole list:
    user tower, exact search and merge. Settings are timed in turns, and the median of the calls counts.
    """
    on_gpu = run.device.type == "cuda"
    clock, finish = (time.perf_counter, torch.cuda.synchronize) if on_gpu else (time.process_time, None)
    found: list[Values] = [{} for _ in searches]
    own = run.model.search
    kinds = {"ms": (1, grid.calls), "batch_ms": (run.data.eval_batch_size, grid.batch_calls)}
    try:
        with torch.inference_mode(), threadpool_limits(1):
            index = run.model.build_index()
            for at, (name, (size, calls)) in enumerate(kinds.items()):
                progress(f"{run.name}: cost", at, len(kinds))
                drawn = draw_users(run, grid.stage, size * min(calls, 20), grid.seed, shuffled=True, batch_size=size)
                batches = [batch.to(run.device) for batch in drawn.batches]
                batches = [batch for batch in batches if len(batch) == len(batches[0])]  # the last may be short
                asked = [_answer(run.model, search, batches, index, grid.k) for search in searches]
                timings = time_in_turns(asked, len(batches), calls, _LIMIT_S, finish, clock)
                for values, timing in zip(found, timings, strict=True):
                    if (median := timing.percentile(50)) is not None:
                        values[name] = median / len(batches[0])
            progress(f"{run.name}: cost", len(kinds), len(kinds))
    finally:
        run.model.search = own
    return found


def measure_interests(runs: Sequence[StudiedRun[SPARC]], grid: InterestGrid, progress: Progress) -> InterestsFound:
    """Every number of interests on every run.

    Raises:
        InputError: the runs are on different items, or a number is above that of the codes.
    """
    wanted = {run.name: numbers_of(run, grid) for run in runs}  # what is wrong shows before hours of work
    found = InterestsFound([], {})
    for group, members in groups_of(runs):
        first, numbers = members[0], wanted[members[0].name]
        own = first.model.search
        by_run: list[dict[int, Values]] = []
        for run in members:
            users = draw_users(run, grid.stage, grid.users, grid.seed)
            searches = {number: replace(own, num_interests=number) for number in numbers}
            values = measure(run, users, searches, grid.k, progress, f"{run.name}: lists")
            tower = interest_tower(run, users, progress)
            spent = costs(run, list(searches.values()), grid, progress)
            by_run.append({n: values[n] | tower.values(n) | cost for n, cost in zip(numbers, spent, strict=True)})
            if run is first:
                found.reliability[group.name] = tower.bins(own.num_interests)
        num_codes = first.model.quantizer.num_codes
        found.rows.extend(
            InterestRow(group.name, n, n == own.num_interests, num_codes, over_seeds([values[n] for values in by_run]))
            for n in numbers
        )
    return found


def _answer(model: SPARC, search: SparcSearch, batches: Sequence[SequenceBatch], index: ItemIndex, k: int) -> Search:
    """The lists of a batch, by its number."""

    def answer(number: int) -> Tensor:
        model.search = search
        batch = batches[number]
        return model.recommend(batch, k + batch.seen.shape[1], index).item_ids

    return answer
