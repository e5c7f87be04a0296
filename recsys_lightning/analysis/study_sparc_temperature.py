"""Soft search over its temperature, merge by merge: from the best interest alone to all interests alike.

SPARC (arXiv:2508.09090) names neither a temperature nor a merge (S11). The softmax of the interest logits over the
temperature is what the merges weight interests by; near 0 the best interest has all the weight, and for large ones all
chosen interests have the same.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import polars as pl

from recsys_lightning.analysis.groups import Score
from recsys_lightning.analysis.study_report import Findings, StudyTable
from recsys_lightning.analysis.study_run import Progress, StudiedRun, draw_users
from recsys_lightning.analysis.study_sparc import Stage, groups_of, measure, over_seeds, shown_score
from recsys_lightning.errors import InputError
from recsys_lightning.models.sparc import SPARC, SparcSearch
from recsys_lightning.retrieval.soft_search import Merge

TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
WEIGHTED: tuple[Merge, ...] = ("quota", "p_weighted", "mixture", "sum")  # merges that ask how probable an interest is
TOP_1, UNIFORM = 0.0, math.inf  # the limits of the temperature


@dataclass(frozen=True, kw_only=True)
class TemperatureGrid:
    """What is tried.

    Attributes:
        temperatures: of the softmax over interest logits; the limits are added.
        merges: of the lists of a user's interests, those that weight interests.
        num_interests: K; None takes the run's own.
        k: places over which everything is measured.
        stage: ``val`` or ``test``.
        users: to draw; None takes all.
        seed: of the draw.

    Raises:
        InputError: a list that is empty, repeats a value or holds one that cannot be.
    """

    temperatures: tuple[float, ...] = TEMPERATURES
    merges: tuple[Merge, ...] = WEIGHTED
    num_interests: int | None = None
    k: int = 50
    stage: Stage = "val"
    users: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, values in (("temperatures", self.temperatures), ("merges", self.merges)):
            if not values or len(set(values)) < len(values):
                raise InputError(f"--{name} {' '.join(map(str, values))}: need different values, at least one")
        bad = [value for value in self.temperatures if not 0 < value < math.inf]
        if bad:
            raise InputError(f"--temperatures {bad[0]:g}: need finite values above 0; the limits are always measured")
        unknown = [name for name in self.merges if name not in WEIGHTED]
        if unknown:
            raise InputError(f"--merges {unknown[0]}: the temperature matters to {', '.join(WEIGHTED)} alone")
        if self.k < 1 or (self.num_interests is not None and self.num_interests < 1):
            raise InputError(f"--k {self.k} and --num_interests {self.num_interests} must be at least 1")


class Point(NamedTuple):
    """A setting of soft search.

    Attributes:
        merge: of the lists; ``max``, which weights no interest, and ``-`` where there is one interest only.
        temperature: `TOP_1`, `UNIFORM` or a number; NaN for ``max``, to which it says nothing.
    """

    merge: str
    temperature: float

    @property
    def shown(self) -> str:
        """The temperature as a table may show it."""
        names = {TOP_1: "top-1", UNIFORM: "uniform"}
        return "-" if math.isnan(self.temperature) else names.get(self.temperature, f"{self.temperature:g}")


BEST_ALONE, MAX = Point("-", TOP_1), Point("max", math.nan)


class Measured(NamedTuple):
    """What a setting reached."""

    point: Point
    scores: dict[str, Score]  # by the evaluator's names, over seeds
    own: bool  # it is the runs' own setting


def searches_of(own: SparcSearch, grid: TemperatureGrid) -> dict[Point, SparcSearch]:
    """Every setting to be measured, and how a run is to search for it; the run's own is among them if it has that K.

    Raises:
        InputError: there is one interest only, so there is nothing to weight.
    """
    base = replace(own, num_interests=grid.num_interests or own.num_interests)
    if base.num_interests == 1:
        raise InputError("with one interest a user there is nothing to weight: say --num_interests 2 or more")
    found = {BEST_ALONE: replace(base, num_interests=1, merge="max")}
    for merge in grid.merges:
        for temperature in grid.temperatures:
            found[Point(merge, temperature)] = replace(
                base, merge=merge, temperature=temperature, interests="predicted"
            )
        found[Point(merge, UNIFORM)] = replace(base, merge=merge, interests="uniform")
    found[MAX] = replace(base, merge="max")
    return found | ({own_point(own): own} if base == own else {})


def own_point(own: SparcSearch) -> Point:
    """The setting that a run of several interests ranks with."""
    if own.merge == "max":
        return MAX
    return Point(own.merge, UNIFORM if own.interests == "uniform" else own.temperature)


def measure_temperatures(
    runs: Sequence[StudiedRun[SPARC]], grid: TemperatureGrid, progress: Progress
) -> list[Measured]:
    """Every setting on every run.

    Raises:
        InputError: the runs differ in more than their seed, have one interest a user, or fewer codes than interests.
    """
    groups = groups_of(runs)
    if len(groups) > 1:
        first, second = (group.name for group, _ in groups[:2])
        raise InputError(f"{first} and {second} differ in more than their seed: study them apart")
    search = runs[0].model.search
    wanted = searches_of(search, grid)
    num_codes = runs[0].model.quantizer.num_codes
    if (grid.num_interests or 1) > num_codes:
        raise InputError(f"--num_interests {grid.num_interests}: {runs[0].name} has {num_codes} codes at level 1")
    own = own_point(search) if grid.num_interests in (None, search.num_interests) else None
    found = []
    for run in runs:
        users = draw_users(run, grid.stage, grid.users, grid.seed)
        found.append(measure(run, users, wanted, grid.k, progress, run.name))
    return [Measured(point, over_seeds([values[point] for values in found]), point == own) for point in wanted]


def shown_names(k: int) -> dict[str, str]:
    """Titles of the columns by the evaluator's names of the metrics."""
    return {
        f"/recall@{k}": f"recall@{k}",
        f"-unseen/recall@{k}": f"unseen recall@{k}",
        f"/ndcg@{k}": f"ndcg@{k}",
        f"-unseen/ndcg@{k}": f"unseen ndcg@{k}",
        f"/coverage@{k}": "coverage",
        f"/intra-list-distance@{k}": "intra-list distance",
        f"/distinct-codes@{k}": "level-1 codes",
    }


def temperature_study(runs: Sequence[StudiedRun[SPARC]], grid: TemperatureGrid, progress: Progress) -> Findings:
    """Measure the grid and say what was found.

    Raises:
        InputError: see `measure_temperatures`, or matplotlib is missing.
    """
    from recsys_lightning.analysis.study_sparc_temperature_figure import temperature_png

    found = measure_temperatures(runs, grid, progress)
    names = shown_names(grid.k)
    body = [
        [
            measured.point.merge,
            measured.point.shown + (" (the run's own)" if measured.own else ""),
            *(shown_score(measured.scores.get(name), 1 if "codes" in name else 4) for name in names),
        ]
        for measured in found
    ]
    rows = [
        {"merge": measured.point.merge, "temperature": measured.point.shown, "own": measured.own, "seeds": len(runs)}
        | {name: score.mean for name, score in measured.scores.items()}
        | {f"{name} sd": score.sd for name, score in measured.scores.items()}
        for measured in found
    ]
    search, (users, total) = runs[0].model.search, draw_users(runs[0], grid.stage, grid.users, grid.seed)[1:]
    interests = grid.num_interests or search.num_interests
    without_text = runs[0].data.catalog.text is None
    return Findings(
        title="Soft search over its temperature",
        introduction=_introduction(runs, grid, interests, f"{users:,} of {total:,} users of the {grid.stage} split"),
        tables=[StudyTable("Temperature and merge", ["merge", "temperature", *names.values()], body)],
        remarks=["The data have no text embeddings: there is no intra-list distance."] if without_text else [],
        pictures={".png": temperature_png(found, grid)},
        files={".csv": pl.DataFrame(rows, infer_schema_length=None).write_csv().encode()},
        settings={
            "temperatures": ", ".join(f"{value:g}" for value in grid.temperatures),
            "interests": str(interests),
            "soft search": ", ".join(f"{name}={value}" for name, value in asdict(search).items()),
            "users": f"{users:,} of {total:,}, {grid.stage} split, seed {grid.seed}",
        },
    )


def _introduction(runs: Sequence[StudiedRun[SPARC]], grid: TemperatureGrid, interests: int, users: str) -> list[str]:
    named = ", ".join(f"`{run.name}`" for run in runs)
    seeds = " ± is one standard deviation over seeds." if len(runs) > 1 else ""
    return [
        f"Lists of {named} for {users}, found by the exact index with {interests} interests a user; nothing was "
        "trained again. The temperature is that of the softmax over the logits of the interests, by which the merges "
        "weight them; *max* weights none, *top-1* is the best interest alone, the limit of small temperatures, and "
        "*uniform* gives all of them the same weight, the limit of large ones.",
        f"All measures are over the first {grid.k} places; those named *unseen* are of the lists without the items a "
        "user has met, all others of the whole lists. *Coverage* is the share of the catalogue that is in at least one "
        "list, *intra-list distance* the mean of 1 - cosine of the text embeddings over the pairs of a list, *level-1 "
        f"codes* the mean number of different ones in a list.{seeds}",
    ]
