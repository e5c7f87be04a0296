"""Results of groups of runs side by side, as a table and as a report; a group is a row."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import yaml
from rich.table import Table
from rich.text import Text

from recsys_lightning.analysis.groups import Group, Run, Score, shown_path
from recsys_lightning.errors import InputError

DEFAULT_METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")

# Metrics, without slice and k, of which more or less is better; of others, such as novelty, neither is.
_HIGHER = ("recall", "ndcg", "mrr", "hit_rate", "map", "coverage")
_LOWER = ("gini", "duplicates", "collision_rate", "largest_cell")


# ---------------------------------------------------------------------------------------------------------- the table


class Row(NamedTuple):
    """A row of a comparison."""

    name: str  # of the group, or where the numbers were printed
    model: str
    split: str  # "test", "test-unseen", "val" or "val-unseen"
    num_runs: int | None  # None for printed numbers
    scores: tuple[Score | None, ...]  # one a metric


def rows(groups: Sequence[Group], stage: str, metrics: Sequence[str]) -> list[Row]:
    """A row a group over all items, and one without those a user has seen.

    Raises:
        InputError: no run has any of the metrics in that stage; the message names what there is.
    """
    splits = (stage, f"{stage}-unseen")
    made = [
        Row(group.name, group.model, split, len(group.runs), tuple(group.score(f"{split}/{name}") for name in metrics))
        for group in groups
        for split in splits
    ]
    if not any(score for row in made for score in row.scores):
        wanted = [f"{split}/{metric}" for split in splits for metric in metrics]
        known = sorted({name for group in groups for run in group.runs for name in run.results["metrics"]})
        raise InputError(
            f"none of {wanted} in these runs, which have {known}; run `recsys test`, or choose --stage val"
        )
    # Tokenizers have no users who have seen anything.
    return [row for row in made if row.split == stage or any(row.scores)]


def header(metrics: Sequence[str]) -> list[str]:
    """Titles of the columns of `body`."""
    return ["run", "model", "split", "seeds", *metrics]


def body(table: Sequence[Row]) -> list[list[str]]:
    """Cells of a table: `0.0432 ± 0.0011` is mean and standard deviation over seeds, `-` is no value."""
    return [
        [row.name, row.model, row.split, str(row.num_runs or "-"), *(_cell(score, row) for score in row.scores)]
        for row in table
    ]


def _cell(score: Score | None, row: Row) -> str:
    if score is None:
        return "-"
    digits = 4 if abs(score.mean) < 10 else 2 if abs(score.mean) < 1000 else 0
    text = f"{score.mean:.{digits}f}"
    if score.sd is not None:
        text += f" ± {score.sd:.{digits}f}"
    # Not all seeds may have the metric: then the column of seeds would mislead.
    return text if len(score.values) == (row.num_runs or 1) else f"{text} (n={len(score.values)})"


def best_cells(table: Sequence[Row], metrics: Sequence[str]) -> set[tuple[int, int]]:
    """Places (row, column) in `body` of the best mean of each column and split, ties as printed.

    None where a metric has no better side, and none where all rows are equal.
    """
    found = set()
    for at, metric in enumerate(metrics):
        kind = metric.rpartition("/")[2].partition("@")[0]
        if kind not in _HIGHER + _LOWER:
            continue
        for split in {row.split for row in table}:
            means = {
                line: round(score.mean, 4)
                for line, row in enumerate(table)
                if row.split == split and (score := row.scores[at])
            }
            if len(set(means.values())) > 1:
                best = max(means.values()) if kind in _HIGHER else min(means.values())
                found |= {(line, len(header(())) + at) for line, mean in means.items() if mean == best}
    return found


def terminal_table(
    title: str, head: Sequence[str], body: Sequence[Sequence[str]], bold: Collection[tuple[int, int]] = ()
) -> Table:
    """A table for a terminal; `bold` are places (row, column) in its body."""
    table = Table(title=title)
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    for line, row in enumerate(body):
        cells = [Text(cell, style="bold" if (line, at) in bold else "") for at, cell in enumerate(row)]
        table.add_row(*cells)
    return table


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]], bold: Collection[tuple[int, int]] = ()) -> str:
    """A table in Markdown; `bold` are places (row, column) in its body."""
    marked = [[f"**{cell}**" if (line, at) in bold else cell for at, cell in enumerate(row)]
              for line, row in enumerate(body)]  # fmt: skip
    lines = [head, ["---"] * len(head), *marked]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# --------------------------------------------------------------------------------------------------------- the report


def markdown_report(
    title: str,
    command: str,
    groups: Sequence[Group],
    tables: Sequence[str],
    remarks: Sequence[str] = (),
) -> str:
    """A comparison with everything needed to judge and repeat it: settings, seed, data, code, hardware, time.

    Args:
        title: first line.
        command: the command line that writes this report.
        groups: what is compared.
        tables: tables, pictures and headings in Markdown, in order.
        remarks: lines below them.
    """
    runs = [run for group in groups for run in group.runs]
    parts = [
        f"# {title}",
        f"Written by `{command}`. Exact item ids, the whole catalogue ranked; the splits named *unseen* first strike "
        "the items a user has already met.",
        *tables,
        *remarks,
        "## How it was measured",
        markdown_table(
            ["run", "seed", "epochs", "steps", "parameters", "seconds", "hardware", "data", "text encoder", "code"],
            [_provenance(run) for run in runs],
        ),
    ]
    for run in runs:
        settings = yaml.safe_dump(_shown(run.results["config"]), sort_keys=False, width=110)
        parts += [f"<details><summary>settings of {run.name}</summary>", f"```yaml\n{settings}```", "</details>"]
    return "\n\n".join(parts) + "\n"


def _shown(value: Any) -> Any:
    """A configuration with its absolute paths as a report may show them."""
    if isinstance(value, dict):
        return {key: _shown(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shown(inner) for inner in value]
    return shown_path(value) if isinstance(value, str) else value


def _provenance(run: Run) -> list[str]:
    results = run.results
    data, hardware, code = results["data"], results["hardware"], results["code"]
    machine = hardware["gpu"] or f"{hardware['cpu_cores']} CPU cores ({hardware['cpu']})"
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in results["seconds_by_command"].items())
    values = [
        run.name,
        results["seed"],
        results.get("epochs"),
        results.get("steps"),
        results.get("parameters"),
        seconds,
        f"{hardware['devices']} x {machine}, torch {hardware['torch']}",
        f"{data.get('source')} {str(data.get('fingerprint'))[:12]}",
        (data.get("text_encoder") or "none")[:80],
        f"{code['version']} {code['commit'] or ''} {code['sha256'][:12]}",
    ]
    return ["-" if value is None else str(value) for value in values]
