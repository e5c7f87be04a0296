"""The table, the picture and the report of a grid: as `recsys compare` has them, a row a variant."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from recsys_lightning.analysis import compare, paired
from recsys_lightning.analysis.figures import comparison_png
from recsys_lightning.analysis.grid import Entry, Grid
from recsys_lightning.analysis.grid_runs import GridRun, without_places
from recsys_lightning.analysis.groups import Group, Run, load_results, warnings
from recsys_lightning.analysis.published import published_rows, standing
from recsys_lightning.analysis.user_values import all_values

_RESAMPLES, _SEED = 10_000, 0  # of the bootstrap


class GridReport(NamedTuple):
    """What a grid has shown so far."""

    tables: list[Table]  # for a terminal
    remarks: list[str]  # lines below them
    files: dict[Path, bytes]  # the report, its numbers and its picture; empty if the grid names no report


def report(grid: Grid, runs: Mapping[str, GridRun], unfinished: Mapping[str, str], command: str) -> GridReport:
    """Compare the variants of which at least one run is finished; the first of them is the baseline.

    Args:
        grid: the grid.
        runs: of the grid, by name.
        unfinished: what keeps a variant's run out of the table, by name of the run.
        command: the command line that writes the report.

    Raises:
        InputError: no run has any of the metrics.
    """
    groups = _groups(grid, runs, unfinished)
    baseline, metrics = groups[0].name, grid.metrics
    measured = compare.rows(groups, "test", metrics)
    table = measured + (published_rows(grid.published, metrics) if grid.published else [])
    known, remarks = all_values(groups, "test", metrics)
    tests, unpaired = paired.paired_tests(known, baseline, _RESAMPLES, _SEED)
    missing = [f"Not in this table: `{name}`, {why}." for name, why in unfinished.items()]
    remarks = missing + warnings(groups) + _code_remark(groups) + remarks + unpaired
    if tests:
        numbers = {"resamples": _RESAMPLES, "seed": _SEED, "tests": len(tests), "smallest": _RESAMPLES + 1}
        remarks += [note.format(**numbers) for note in paired.NOTES]
    if grid.published:
        remarks += [line for group in groups if (line := standing(group, grid.published))]
    head, body, bold = compare.header(metrics), compare.body(table), compare.best_cells(table, metrics)
    pairs = paired.paired_body(measured, metrics, baseline, tests) if tests else []
    heading = f"Difference from {baseline}, over the same users"
    tables = [compare.terminal_table(grid.title, head, body, bold)]
    tables += [compare.terminal_table(heading, paired.PAIRED_HEADER, pairs)] if pairs else []
    if grid.report is None:
        return GridReport(tables, remarks, {})

    intervals = paired.user_intervals(known, _RESAMPLES, _SEED)
    picture, numbers_file = grid.report.with_suffix(".png"), grid.report.with_suffix(".csv")
    parts = [compare.markdown_table(head, body, bold), f"![{grid.title}]({picture.name.replace(' ', '%20')})"]
    parts += [f"## {heading}", compare.markdown_table(paired.PAIRED_HEADER, pairs)] if pairs else []
    parts += ["## What each variant changes", _changes_table(grid, [group.name for group in groups])]
    text = compare.markdown_report(grid.title, command, _short(groups), parts, remarks)
    files = {
        picture: comparison_png(grid.title, table, metrics, intervals),
        numbers_file: paired.csv_text(measured, metrics, baseline, tests).encode(),
        grid.report: text.encode(),
    }
    return GridReport(tables, remarks, files)


def _groups(grid: Grid, runs: Mapping[str, GridRun], unfinished: Mapping[str, str]) -> list[Group]:
    """The finished runs by variant; their names are those of their folders."""
    groups = []
    for variant in grid.variants:
        own = [run for run in runs.values() if run.entry.name == variant.name and run.name not in unfinished]
        if own:
            groups.append(Group(variant.name, tuple(Run(r.name, r.folder, load_results(r.folder)) for r in own)))
    return groups


def _code_remark(groups: Sequence[Group]) -> list[str]:
    """A line if the rows were made by different versions of the code; within one row `warnings` has said so."""
    versions = {group.runs[0].results["code"].get("sha256") for group in groups}
    return ["The rows were made by different versions of the code: see the last column below."] * (len(versions) > 1)


def _changes_table(grid: Grid, names: Sequence[str]) -> str:
    """What each row sets that the base does not have, in Markdown."""
    lines = [["every variant", f"from {grid.base.as_posix()}", _settings(grid.common)]]
    for entry in grid.entries.values():
        if not entry.first and entry.name in names:
            what = f"tested with the weights of {entry.weights}" if entry.weights else "trained"
            lines.append([entry.name, f"{what}{_other_base(grid, entry)}", _settings(entry.own)])
    for entry in grid.entries.values():
        if entry.first:
            lines.append([entry.name, f"trained once, from {entry.base.as_posix()}", _settings(entry.own)])
    return compare.markdown_table(["variant", "how", "settings"], lines)


def _other_base(grid: Grid, entry: Entry) -> str:
    usual = entry.weights is not None or entry.base == grid.base
    return "" if usual else f", from {entry.base.as_posix()}"


def _settings(settings: Mapping[str, object]) -> str:
    shown = (value if isinstance(value, str) else json.dumps(value) for value in settings.values())
    return ", ".join(f"`{key}={value}`" for key, value in zip(settings, shown, strict=True)) or "-"


def _short(groups: Sequence[Group]) -> list[Group]:
    """The groups with the settings of the first run in full, and of the others what differs from it."""
    first = groups[0].runs[0]
    whole = without_places(first.results["config"])

    def shortened(run: Run) -> Run:
        if run is first:
            return run
        own = without_places(run.results["config"])
        changed = {key: own.get(key) for key in {**whole, **own} if own.get(key) != whole.get(key)}
        return run._replace(results={**run.results, "config": {f"as {first.name}, but for": changed}})

    return [Group(group.name, tuple(shortened(run) for run in group.runs)) for group in groups]
