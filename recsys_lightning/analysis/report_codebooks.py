"""How the codes of the catalogue are used: heat maps and health over time with what was done about it, cell sizes."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_lightning.analysis.report_blocks import Block, DataTable, Paragraph, Plot, Section
from recsys_lightning.analysis.report_figures import Line, bar_figure, heat_figure, line_figure, mark_events
from recsys_lightning.analysis.report_sources import Source

_LEVELLED = {
    "entropy": ("Entropy", "share of the maximum", "1 is even use of all codes."),
    "perplexity": ("Perplexity", "codes", "The number of evenly used codes of the same entropy."),
    "dead_codes": ("Dead codes", "codes", "Codes that no item has."),
    "gini": ("Gini of the use", "Gini", "0 is even use, 1 is all items on one code."),
    "residual_norm": ("What a level leaves", "share of the norm", "Mean norm of what is left after a level."),
}
_WHOLE = {
    "churn": ("Churn", "share of items", "Items whose semantic ID changed since the check before."),
    "collision_rate": ("Collision rate", "share of items", "Items whose semantic ID another item has too."),
    "cells": ("Occupied cells", "cells", "Different semantic IDs in use."),
    "largest_cell": ("Largest cell", "items", "Items that share one semantic ID."),
    "reconstruction_error": ("Reconstruction error", "share of variance", "1 is no better than the mean item."),
}
_BINS = 40  # of the histogram of cell sizes
_EVENT_HEAD = ("step", "epoch", "level", "finding", "action", "codes", "message")


def codebooks(sources: Mapping[str, Source]) -> Section:
    """Usage heat maps, entropy and its kin over time, and the events of each run.

    Args:
        sources: runs by the names they are shown under.
    """
    blocks: list[Block] = []
    for name, source in sources.items():
        of = f", {name}" if len(sources) > 1 else ""
        found = [*_heat_maps(of, source), *_health(of, source)]
        if found or source.events:
            blocks += found
            blocks += _events(name, source)
    missing = "No run logs codebook metrics: none has codebooks of its own, or no epoch is over."
    return Section("codebooks", "Codebooks over time", blocks, missing)


def _heat_maps(of: str, source: Source) -> list[Block]:
    if source.usage is None:
        return []
    plots: list[Block] = []
    for level in sorted(source.usage["level"].unique().to_list()):
        steps, counts = usage_grid(source.usage, level)
        figure = heat_figure(steps, counts.tolist(), "step", "code", "items")
        places, texts = _places(source, level, steps)
        mark_events(figure, places, texts, axis="category")
        note = "Items on each code at each check; triangles are events."
        plots.append(Plot(f"Use of level {level}{of}", figure, note, height=340))
    return plots


def usage_grid(usage: pl.DataFrame, level: int) -> tuple[list[float], NDArray[np.float64]]:
    """Steps of the checks, and items (codes, checks) of each code; a code that a check does not name has none.

    A step that was checked twice counts with what was written last.
    """
    rows = usage.filter(pl.col("level") == level).unique(["step", "code"], keep="last", maintain_order=True)
    steps = sorted(rows["step"].unique().to_list())
    grid = np.zeros((int(rows["code"].max()) + 1, len(steps)))  # type: ignore[arg-type] # codes are whole numbers
    column = {step: at for at, step in enumerate(steps)}
    for step, code, items in rows.select("step", "code", "items").iter_rows():
        grid[code, column[step]] = items
    return [float(step) for step in steps], grid


def _places(source: Source, level: int, steps: list[float]) -> tuple[list[float], list[str]]:
    """The checks at which a level had events, and what they were; an event between checks is shown at the next one."""
    places, texts = [], []
    for event in source.events:
        at = _number(event.get("step"))
        later = [step for step in steps if at is not None and step >= at] or steps[-1:]
        if at is not None and later and event.get("level") in (level, None):
            places.append(later[0])
            texts.append(event_text(event))
    return places, texts


def event_text(event: Mapping[str, Any]) -> str:
    """An event in one line."""
    what = f"{event.get('finding', '?')}: {event.get('action', '?')}"
    return f"level {event['level']}, {what}" if event.get("level") is not None else what


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _health(of: str, source: Source) -> list[Block]:
    """A plot a metric, a line a level. Tokenizers may log them as ``val/...``."""
    plots: list[Block] = []
    for metric, (title, unit, note) in (_LEVELLED | _WHOLE).items():
        lines = []
        for prefix in ("codebook", "val"):
            pattern = re.compile(rf"{prefix}/{metric}@(\d+)")
            columns = {column: int(m[1]) for column in source.metrics.columns if (m := pattern.fullmatch(column))}
            columns |= {column: 0 for column in source.metrics.columns if column == f"{prefix}/{metric}"}
            for column, level in sorted(columns.items(), key=lambda pair: pair[1]):
                steps, values = source.curve(column)
                if steps:
                    lines.append(Line(f"level {level}" if level else title.lower(), steps, values, max(level - 1, 0)))
            if lines:
                break  # the same metric under its other name
        if lines:
            figure = line_figure(lines, "step", unit)
            steps = [at for event in source.events if (at := _number(event.get("step"))) is not None]
            texts = [event_text(event) for event in source.events if _number(event.get("step")) is not None]
            if metric in ("entropy", "perplexity", "dead_codes"):
                mark_events(figure, steps, texts)
            plots.append(Plot(f"{title}{of}", figure, note, height=260))
    return plots


def _events(name: str, source: Source) -> list[Block]:
    if not source.events:
        return [Paragraph(f"{name}: no codebook events.")] if source.usage is not None else []
    body = []
    for event in source.events:
        codes = event.get("codes")
        shown = f"{len(codes)}" if isinstance(codes, list) else "-"
        words = [event.get(key) for key in ("step", "epoch", "level", "finding", "action")]
        message = event.get("message") or "-"
        body.append([*("-" if word is None else str(word) for word in words), shown, str(message)])
    return [DataTable(f"Codebook events of {name}", _EVENT_HEAD, body, words=0)]


# ---------------------------------------------------------------------------------------------------------- cell sizes


class CellSizes(NamedTuple):
    """How many cells there are of each size."""

    sizes: NDArray[np.int64]  # items of a cell, rising
    cells: NDArray[np.int64]  # cells of that size


def cell_sizes(codes: NDArray[np.int64]) -> CellSizes:
    """Count the cells of the codes (I, L) of all items."""
    _, members = np.unique(codes, axis=0, return_counts=True)
    sizes, cells = np.unique(members, return_counts=True)
    return CellSizes(sizes, cells)


def bin_edges(largest: int) -> NDArray[np.int64]:
    """Edges of bins of whole sizes from 1 to the largest: one size each, or as wide as leaves 40 bins at most."""
    width = -(-largest // _BINS)
    return np.arange(1, largest + width + 1, width)


def _range(edges: NDArray[np.int64], at: int) -> str:
    """The sizes of a bin."""
    first, last = int(edges[at]), int(edges[at + 1]) - 1
    return f"{first}" if first == last else f"{first} to {last}"


def cell_histogram(codes: Mapping[str, NDArray[np.int64]], remarks: list[str]) -> Section:
    """Cells by the number of their items.

    Args:
        codes: (I, L) of the items of each run that has semantic IDs, by name.
        remarks: why other runs have none here.
    """
    blocks: list[Block] = []
    if codes:
        bars, body = [], []
        largest = max(int(cell_sizes(table).sizes.max()) for table in codes.values())
        for style, (name, table) in enumerate(codes.items()):
            found = cell_sizes(table)
            share = found.sizes * found.cells / len(table)
            edges = bin_edges(largest)
            cells, _ = np.histogram(found.sizes, edges, weights=found.cells)
            held, _ = np.histogram(found.sizes, edges, weights=share)
            there = np.flatnonzero(cells)
            texts = [f"{_range(edges, at)} in a cell: {held[at]:.1%} of the items" for at in there.tolist()]
            middles = ((edges[:-1] + edges[1:] - 1) / 2)[there].tolist()
            bars.append(Line(name, middles, cells[there].tolist(), style, text=texts))
            alone = float(share[found.sizes == 1].sum())
            numbers = (len(table), int(found.cells.sum()), int(found.sizes.max()))
            body.append([name, *(f"{number:,}" for number in numbers), f"{alone:.1%}", f"{1 - alone:.1%}"])
        note = "A cell is the set of items that share one semantic ID. The axis of the cells is logarithmic."
        figure = bar_figure(bars, "items in a cell", "cells", log_y=True)
        most = max(max(bar.y) for bar in bars)
        figure.update_yaxes(range=[math.log10(0.5), math.log10(2 * most)])  # a bar of one cell has some height
        blocks.append(Plot("Cell sizes", figure, note, wide=True))
        head = ("run", "items", "cells", "largest cell", "items alone", "collision rate")
        blocks.append(DataTable("Cells", head, body))
    blocks += [Paragraph(line) for line in remarks] if blocks else []
    missing = " ".join(remarks) or "No run has semantic IDs."
    return Section("cells", "Cell sizes", blocks, missing)
