"""Recall against the diversity of the lists: a curve for models with a knob between the two, a point for others."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from recsys_lightning.analysis.report_blocks import Block, Paragraph, Plot, Section
from recsys_lightning.analysis.report_figures import SYMBOLS, colour, line_figure, plain
from recsys_lightning.analysis.report_opened import OpenedRun
from recsys_lightning.analysis.report_sources import Source
from recsys_lightning.analysis.study_run import Progress, StudiedRun, Users, draw_users
from recsys_lightning.analysis.study_sparc import CatalogueFacts, Stage, Tally, Values, measure
from recsys_lightning.analysis.study_sparc_temperature import MAX, TemperatureGrid, own_point, searches_of
from recsys_lightning.errors import InputError
from recsys_lightning.models.cobra import COBRA
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.models.sparc import SPARC
from recsys_lightning.retrieval.beam_fusion import beam_candidates, rank_fused
from recsys_lightning.retrieval.fusion_weights import Mode

if TYPE_CHECKING:
    import plotly.graph_objects as go

TAUS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
TEMPERATURES = (0.2, 0.5, 1.0, 2.0, 5.0)
_AXES = {"intra-list-distance": "intra-list distance", "coverage": "coverage", "distinct-codes": "level-1 codes"}
_NOTES = {
    "intra-list-distance": "Mean of 1 - cosine of the text embeddings over the pairs of a list.",
    "coverage": "Share of the catalogue that is in at least one list.",
    "distinct-codes": "Mean number of different level-1 codes in a list.",
}


class CurvePoint(NamedTuple):
    """What a run reached with one setting of its knob."""

    setting: str
    values: Values  # by the evaluator's names
    own: bool  # it is the run's own setting
    apart: bool = False  # it is no point of the curve


def diversity(
    runs: Sequence[OpenedRun], sources: Mapping[str, Source], k: int | None, users: int, seed: int, progress: Progress
) -> Section:
    """The same users ranked by every run.

    Args:
        runs: opened; none of them leaves the points that the results hold.
        sources: all runs by name.
        k: cut-off of lists and recall; None for runs without recall.
        users: to draw from the test split.
        seed: of the draw.
        progress: told of each batch.
    """
    missing = "No run ranks items."
    if k is None:
        return Section("diversity", "Recall and diversity", (), missing)
    found: dict[str, list[CurvePoint]] = {}
    remarks: list[str] = []
    for run in runs:
        if run.studied is not None:
            try:
                found[run.name] = curve(run, k, users, seed, progress)
            except InputError as error:
                remarks.append(f"{run.name}: {error}.")
    note = (
        f"At most {users:,} test users (seed {seed}), the same for every run, seen items included; large markers are "
        "the runs' own settings."
    )
    if not found:
        found = {name: points for name, source in sources.items() if (points := recorded_point(source))}
        note = "All users, as recorded in results.json, seen items included."
    blocks = _plots(found, k)
    if blocks:
        knobs = (
            "Along a SPARC curve the temperature of the softmax over interests changes, from the best interest alone "
            "to all alike; along a COBRA curve tau, the weight of the beam score in BeamFusion. A point tells its "
            "setting where the pointer is on it."
        )
        if any(len(points) > 1 for points in found.values()):
            blocks.append(Paragraph(knobs))
        blocks.append(Paragraph(f"{note} {_error(found, k)}"))
        blocks += [Paragraph(line) for line in remarks]
    return Section("diversity", "Recall and diversity", blocks, " ".join(remarks) or missing)


def _error(found: Mapping[str, Sequence[CurvePoint]], k: int) -> str:
    """How far the recall of so few users may be from that of all."""
    worst = 0.0
    for points in found.values():
        for point in points:
            recall, users = point.values[f"/recall@{k}"], point.values["/users"]
            worst = max(worst, math.sqrt(recall * (1 - recall) / users))
    return f"A recall over these users has a standard error of up to {worst:.3f}: small steps of a curve are noise."


def recorded_point(source: Source) -> list[CurvePoint]:
    """The test metrics of a run, as a curve of one point; none without a test."""
    metrics = source.run.results["metrics"]
    values = {name.removeprefix("test"): value for name, value in metrics.items() if name.startswith("test/")}
    return [CurvePoint("own", values, own=True)] if values else []


def curve(run: OpenedRun, k: int, users: int, seed: int, progress: Progress) -> list[CurvePoint]:
    """What a run reaches as its knob is turned; one point for a model without.

    Raises:
        InputError: the run has no test users.
    """
    assert run.studied is not None  # noqa: S101 - see diversity
    drawn = draw_users(run.studied, "test", users, seed)
    what = f"{run.name}: recall and diversity"
    model = run.studied.model
    if isinstance(model, SPARC) and model.has_codes and model.search.num_interests > 1:
        return _sparc(cast(StudiedRun[SPARC], run.studied), drawn, k, progress, what)
    if isinstance(model, COBRA) and model.tokens.paths == "both" and model.search.fusion in ("global", "per_id"):
        return _cobra(run, model, drawn, k, progress, what)
    return [CurvePoint("own", _own(run, drawn, k, progress, what), own=True)]


def _sparc(run: StudiedRun[SPARC], users: Users, k: int, progress: Progress, what: str) -> list[CurvePoint]:
    own = run.model.search
    merge = own.merge if own.merge != "max" else "mixture"
    stage: Stage = "test"
    grid = TemperatureGrid(temperatures=TEMPERATURES, merges=(merge,), k=k, stage=stage)
    found = measure(run, users, searches_of(own, grid), k, progress, what)
    at = own_point(own)
    on = sorted((point for point in found if point != MAX), key=lambda point: point.temperature)
    points = [CurvePoint(f"{merge}, temperature {p.shown}", found[p], p == at) for p in on]
    # The merge that knows no temperature is no point of the curve: it is shown where the run ranks by it.
    return points + [CurvePoint("max", found[MAX], own=True, apart=True)] * (at == MAX)


def _cobra(run: OpenedRun, model: COBRA, users: Users, k: int, progress: Progress, what: str) -> list[CurvePoint]:
    search, trie = model.search, model.trie
    studied = run.studied
    assert trie is not None  # noqa: S101 - it has both paths
    assert studied is not None  # noqa: S101 - see diversity
    taus = sorted({*TAUS, search.tau})
    tallies = {tau: _tally(run, k) for tau in taus}
    mode: Mode = "per_id" if search.fusion == "per_id" else "global"
    with torch.inference_mode():
        vectors = model.item_table()
        for number, batch in enumerate(users.batches):
            progress(what, number, len(users.batches))
            batch = batch.to(studied.device)
            beams = model.generate(batch, vectors, search.num_beams)
            found = beam_candidates(beams, trie, vectors, search.per_cell, search.omega)
            for tau, tally in tallies.items():
                tally.update(batch, rank_fused(found, beams, k + batch.seen.shape[1], tau, search.psi, mode))
    progress(what, len(users.batches), len(users.batches))
    own = search.tau if not model.learned else None  # learned weights are no point of the curve
    return [CurvePoint(f"tau {tau:g}", _values(run, tally), tau == own) for tau, tally in tallies.items()]


def _own(run: OpenedRun, users: Users, k: int, progress: Progress, what: str) -> Values:
    studied = cast(StudiedRun[Recommender], run.studied)
    tally = _tally(run, k)
    with torch.inference_mode():
        index = studied.model.build_index()
        for number, batch in enumerate(users.batches):
            progress(what, number, len(users.batches))
            batch = batch.to(studied.device)
            tally.update(batch, studied.model.recommend(batch, k + batch.seen.shape[1], index))
    progress(what, len(users.batches), len(users.batches))
    return _values(run, tally)


def _tally(run: OpenedRun, k: int) -> Tally:
    studied = cast(StudiedRun[Recommender], run.studied)
    level1 = torch.zeros(run.catalog.num_items + 1, dtype=torch.long) if run.level1 is None else run.level1
    return Tally(CatalogueFacts(run.catalog, level1, studied.device), k)


def _values(run: OpenedRun, tally: Tally) -> Values:
    """The metrics of a tally, without those of codes that the model has not."""
    values = tally.compute()
    return values if run.level1 is not None else {name: v for name, v in values.items() if "distinct-codes" not in name}


def _plots(found: Mapping[str, Sequence[CurvePoint]], k: int) -> list[Block]:
    plots: list[Block] = []
    for metric, title in _AXES.items():
        figure = line_figure((), title, f"recall@{k}")
        for style, (name, points) in enumerate(found.items()):
            shown = [p for p in points if f"/{metric}@{k}" in p.values and f"/recall@{k}" in p.values]
            if not shown:
                continue
            for points in ([p for p in shown if not p.apart], [p for p in shown if p.apart]):
                if points:
                    listed = len(found) > 1 and not points[0].apart
                    figure.add_trace(_trace(name, style, points, metric, k, listed))
        if figure.data:
            figure.update_layout(hovermode="closest")
            plots.append(Plot(f"Recall@{k} and {title}", figure, _NOTES[metric]))
    return plots


def _trace(name: str, style: int, points: Sequence[CurvePoint], metric: str, k: int, listed: bool) -> "go.Scatter":
    """The points of one run; its own settings are large."""
    import plotly.graph_objects as go

    x, y = ([point.values[f"/{column}@{k}"] for point in points] for column in (metric, "recall"))
    return go.Scatter(
        x=x,
        y=y,
        name=plain(name),
        showlegend=listed,
        mode="lines+markers",
        line={"color": colour(style), "width": 1.4},
        marker={
            "symbol": SYMBOLS[style % len(SYMBOLS)],
            "size": [13 if point.own else 6 for point in points],
            "color": colour(style),
            "opacity": 1,
        },
        text=[plain(point.setting + (" (the run's own)" if point.own else "")) for point in points],
        hovertemplate="%{text}<br>recall %{y:.4f}, " + f"{_AXES[metric]} %{{x:.4g}}<extra>{plain(name)}</extra>",
    )
