"""The report's tables: what the runs reached, over all items and those a user has not met, by slice, and of lists."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple

from recsys_lightning.analysis import compare
from recsys_lightning.analysis.groups import Group, warnings
from recsys_lightning.analysis.paired import NOTES, PAIRED_HEADER, paired_body, paired_tests
from recsys_lightning.analysis.report_blocks import Block, DataTable, Paragraph, Section
from recsys_lightning.analysis.user_values import all_values

SLICES = ("head", "mid", "tail", "cold-item", "cold-user")
_LISTS = ("coverage", "gini", "novelty", "intra-list-distance", "distinct-codes", "duplicates")
_GENERATED = ("semantic-id/recall", "semantic-id/inflation")
_CODES = ("collision_rate", "cells", "largest_cell", "reconstruction_error", "loss")
_RESAMPLES = 10_000


class Measured(NamedTuple):
    """Groups that are shown with one stage's metrics."""

    stage: str  # "test" or "val"
    groups: list[Group]


def group_names(groups: Sequence[Group]) -> dict[str, str]:
    """Short names of groups, by their own: the last two folders, and the whole where that is not unique."""
    short = ["/".join(PurePath(group.name).parts[-2:]) for group in groups]
    return {
        group.name: name if short.count(name) == 1 else group.name for group, name in zip(groups, short, strict=True)
    }


def by_stage(groups: Sequence[Group]) -> list[Measured]:
    """Groups with the stage each is shown with: its test, and validation where it was not tested.

    A group that has neither is in none.
    """
    found: dict[str, list[Group]] = {"test": [], "val": []}
    for group in groups:
        names = {name.partition("/")[0] for run in group.runs for name in run.results["metrics"]}
        stage = next((stage for stage in found if stage in names), None)
        if stage:
            found[stage].append(group)
    return [Measured(stage, members) for stage, members in found.items() if members]


def cut_offs(groups: Sequence[Group]) -> list[int]:
    """The cut-offs k of recall@k that any of the groups has, rising."""
    names = {name.rpartition("/")[2] for group in groups for run in group.runs for name in run.results["metrics"]}
    return sorted(int(name.removeprefix("recall@")) for name in names if name.startswith("recall@"))


def chosen_cut_off(groups: Sequence[Group], wanted: int) -> int | None:
    """The cut-off nearest to the one wanted, of equals the larger; None where no run has recall."""
    known = cut_offs(groups)
    return min(known, key=lambda k: (abs(k - wanted), -k)) if known else None


def headline(groups: Sequence[Group], k: int | None, seed: int = 0) -> Section:
    """The headline table, slices and lists, and where runs share their users, paired tests.

    Args:
        groups: what is compared.
        k: cut-off of the slices and of the lists; None for runs without recall.
        seed: of the bootstrap of the paired tests.
    """
    known = [group for group in groups if group.runs[0].results["data"]]  # of runs under way nothing is known yet
    blocks: list[Block] = [Paragraph(_plain(line), "warning") for line in warnings(known)]
    for measured in by_stage(groups):
        blocks += _of_stage(measured, k)
        blocks += _paired(measured, k, seed) if k is not None else []
    if any("unseen" in row for block in blocks if isinstance(block, DataTable) for row in block.body):
        blocks.append(Paragraph(_COLUMNS))
    return Section("headline", "Headline", blocks, "No metrics yet: the first validation is still to come.")


def _of_stage(measured: Measured, k: int | None) -> list[Block]:
    stage, groups = measured
    names = group_names(groups)
    known = {name for group in groups for run in group.runs for name in run.results["metrics"]}
    cuts = cut_offs(groups)
    tables: list[tuple[str, list[str]]] = [
        ("Ranking", [f"{kind}@{cut}" for kind in ("recall", "ndcg") for cut in cuts]),
    ]
    if k is not None:
        tables += [
            (f"Slices, recall@{k}", [f"{part}/recall@{k}" for part in SLICES]),
            (f"Lists of {k}", [f"{name}@{k}" for name in (*_LISTS, *_GENERATED)]),
        ]
    levels = sorted(name.partition("/")[2] for name in known if "/perplexity@" in name or "/dead_codes@" in name)
    tables.append(("Semantic IDs", [*_CODES, *dict.fromkeys(levels)]))
    blocks: list[Block] = []
    for title, metrics in tables:
        metrics = [name for name in metrics if {f"{stage}/{name}", f"{stage}-unseen/{name}"} & known]
        # There are no duplicates unless something is wrong.
        metrics = [name for name in metrics if not name.startswith("duplicates") or _any(groups, stage, name)]
        if not metrics:
            continue
        rows = [row for row in compare.rows(groups, stage, metrics) if any(row.scores)]
        body = [
            [_run_cell(row, names), _ITEMS[row.split.endswith("-unseen")], *cells[len(compare.header(())) :]]
            for row, cells in zip(rows, compare.body(rows), strict=True)
        ]
        fewer = len(compare.header(())) - 2  # model, split and seeds stand in one column less each
        bold = frozenset((line, at - fewer) for line, at in compare.best_cells(rows, metrics))
        head = ["run", "items", *(_short(name, title, measured) for name in metrics)]
        blocks.append(DataTable(f"{title} ({_STAGES[stage]})", head, body, bold, words=2))
    return blocks


def _any(groups: Sequence[Group], stage: str, metric: str) -> bool:
    """Whether the metric is anything but zero in any run."""
    splits = (stage, f"{stage}-unseen")
    return any(run.results["metrics"].get(f"{s}/{metric}") for group in groups for run in group.runs for s in splits)


_STAGES = {"test": "test", "val": "validation"}
_ITEMS = ("all", "unseen")
_COLUMNS = (
    "All: every item of the catalogue can be listed. Unseen: the items that a user has already met are struck from his "
    "lists first. The best of each column and split is marked."
)


def _run_cell(row: compare.Row, names: Mapping[str, str]) -> str:
    """The name of a group, its model and, of several, how many seeds it has."""
    seeds = f", {row.num_runs} seeds" if (row.num_runs or 1) > 1 else ""
    return f"{names[row.name]} ({row.model}{seeds})"


def _short(metric: str, title: str, measured: Measured) -> str:
    """The head of a column: of a slice its name and how many users it has, if all runs agree on that."""
    if not title.startswith("Slices"):
        return (metric.partition("@")[0] if title.startswith("Lists") else metric).replace("_", " ")
    part = metric.partition("/")[0]
    sizes = {
        run.results["metrics"].get(f"{measured.stage}/{part}/users") for group in measured.groups for run in group.runs
    }
    size = sizes.pop() if len(sizes) == 1 else None
    return part if size is None else f"{part} (n={size:,.0f})"


def _paired(measured: Measured, k: int, seed: int) -> list[Block]:
    """Differences from the first group, over the same users."""
    stage, groups = measured
    if len(groups) < 2:
        return []
    metrics = [f"recall@{k}", f"ndcg@{k}"]
    values, remarks = all_values(groups, stage, metrics)
    baseline = groups[0].name
    tests, unpaired = paired_tests(values, baseline, _RESAMPLES, seed)
    blocks: list[Block] = []
    if tests:
        body = paired_body(compare.rows(groups, stage, metrics), metrics, baseline, tests)
        names = group_names(groups)
        body = [[names[row[0]], _ITEMS[row[1].endswith("-unseen")], *row[2:]] for row in body]
        title = f"Difference from {names[baseline]}, over the same users"
        head = ["items" if name == "split" else name for name in PAIRED_HEADER]
        blocks.append(DataTable(title, head, body, words=3))
        numbers = {"resamples": _RESAMPLES, "seed": seed, "tests": len(tests), "smallest": _RESAMPLES + 1}
        blocks += [Paragraph(_plain(note.format(**numbers))) for note in NOTES]
    return blocks + [Paragraph(_plain(line)) for line in (*remarks, *unpaired)]


def _plain(line: str) -> str:
    """Markdown without its marks."""
    return line.replace("**", "").replace("`", "").replace("*", "")
