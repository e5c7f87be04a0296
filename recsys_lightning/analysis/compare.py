"""Results of several runs side by side, as rows, on a terminal and as Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from recsys_lightning.errors import InputError

DEFAULT_METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")

# What a table or a report is made of; every run writes them all.
_PARTS = ("metrics", "run", "model", "seed", "data", "hardware", "seconds_by_command", "code", "config")


def load_results(run: str | Path) -> dict[str, Any]:
    """The ``results.json`` of a run folder, or that file itself.

    Raises:
        InputError: there is none, or it is not one of ours.
    """
    path = Path(run)
    path = path / "results.json" if path.is_dir() or path.suffix != ".json" else path
    if not path.is_file():
        raise InputError(f"no {path}: a run folder has one after `recsys fit`, with test metrics after `recsys test`")
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    missing = [part for part in _PARTS if not isinstance(results, dict) or part not in results]
    if missing:
        raise InputError(f"{path} holds no {', '.join(missing)}: it was not written by `recsys fit` or `recsys test`")
    return dict(results)


def rows(runs: Sequence[dict[str, Any]], stage: str, metrics: Sequence[str]) -> list[list[str]]:
    """A row a run over all items, and one without those a user has seen: run, model, split, then each metric or `-`.

    Raises:
        InputError: no run has any of the metrics in that stage; the message names what there is.
    """
    splits = (stage, f"{stage}-unseen")
    wanted = [f"{split}/{metric}" for split in splits for metric in metrics]
    if not any(name in run["metrics"] for run in runs for name in wanted):
        known = sorted({name for run in runs for name in run["metrics"]})
        raise InputError(
            f"none of {wanted} in these runs, which have {known}; run `recsys test`, or choose --stage val"
        )
    body = []
    for run in runs:
        for split in splits:
            values = [run["metrics"].get(f"{split}/{metric}") for metric in metrics]
            if split != stage and not any(value is not None for value in values):
                continue  # tokenizers have no users who have seen anything
            body.append([run["run"], run["model"], split, *("-" if v is None else f"{v:.4f}" for v in values)])
    return body


def header(metrics: Sequence[str]) -> list[str]:
    """Titles of the columns of `rows`."""
    return ["run", "model", "split", *metrics]


def terminal_table(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> Table:
    """A table for a terminal."""
    table = Table(title=title)
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    for row in body:
        table.add_row(*row)
    return table


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_report(
    title: str,
    command: str,
    runs: Sequence[dict[str, Any]],
    head: Sequence[str],
    body: Sequence[Sequence[str]],
    remarks: Sequence[str] = (),
) -> str:
    """A comparison with everything needed to judge and repeat it: settings, seed, data, code, hardware, time.

    Args:
        title: first line.
        command: the command line that writes this report.
        runs: the runs, as `load_results` gives them.
        head: titles of the table.
        body: rows of the table.
        remarks: lines below the table.
    """
    parts = [
        f"# {title}",
        f"Written by `{command}`. Exact item ids, the whole catalogue ranked; the splits named *unseen* first strike "
        "the items a user has already met.",
        markdown_table(head, body),
        *remarks,
        "## How it was measured",
        markdown_table(
            ["run", "seed", "epochs", "steps", "parameters", "seconds", "hardware", "data", "text encoder", "code"],
            [_provenance(run) for run in runs],
        ),
    ]
    for run in runs:
        settings = yaml.safe_dump(run["config"], sort_keys=False, width=110)
        parts += [f"<details><summary>settings of {run['run']}</summary>", f"```yaml\n{settings}```", "</details>"]
    return "\n\n".join(parts) + "\n"


def _provenance(run: dict[str, Any]) -> list[str]:
    data, hardware, code = run["data"], run["hardware"], run["code"]
    machine = hardware["gpu"] or f"{hardware['cpu_cores']} CPU cores ({hardware['cpu']})"
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in run["seconds_by_command"].items())
    values = [
        run["run"],
        run["seed"],
        run.get("epochs"),
        run.get("steps"),
        run.get("parameters"),
        seconds,
        f"{hardware['devices']} x {machine}, torch {hardware['torch']}",
        f"{data['source']} {data['fingerprint'][:12]}",
        (data["text_encoder"] or "none")[:80],
        f"{code['version']} {code['commit'] or ''} {code['sha256'][:12]}",
    ]
    return ["-" if value is None else str(value) for value in values]
