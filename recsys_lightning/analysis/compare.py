"""Results of runs side by side, as a table and as a report; runs that differ in their seed alone are one row."""

import json
import math
import re
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.table import Table
from rich.text import Text

from recsys_lightning.errors import InputError

DEFAULT_METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")

# What a table or a report is made of; every run writes them all.
_PARTS = ("metrics", "run", "model", "seed", "data", "hardware", "seconds_by_command", "code", "config")

# Keys of a configuration that say where a run lies and which command came last, not what was trained.
_PLACE = (
    "run_dir",
    "ckpt_path",
    "verbose",
    "weights_only",
    "trainer.logger",
    "trainer.default_root_dir",
    "checkpoint.dirpath",
)
_SEEDS = ("seed_everything", "data.init_args.seed")
_SEED = re.compile(r"(?<![a-z])seed[=_-]?\d+", re.IGNORECASE)  # as in runs/cobra/beauty-seed43

# Metrics, without slice and k, of which more or less is better; of others, such as novelty, neither is.
_HIGHER = ("recall", "ndcg", "mrr", "hit_rate", "map", "coverage")
_LOWER = ("gini", "duplicates", "collision_rate", "largest_cell")


def load_results(run: str | Path) -> dict[str, Any]:
    """The ``results.json`` of a run folder, or that file itself.

    Raises:
        InputError: there is none, or it is not one of ours.
    """
    path = results_file(run)
    if not path.is_file():
        raise InputError(f"no {path}: a run folder has one after `recsys fit`, with test metrics after `recsys test`")
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    missing = [part for part in _PARTS if not isinstance(results, dict) or part not in results]
    if missing:
        raise InputError(f"{path} holds no {', '.join(missing)}: it was not written by `recsys fit` or `recsys test`")
    metrics = results["metrics"]
    if not isinstance(metrics, dict) or not all(isinstance(value, int | float) for value in metrics.values()):
        raise InputError(f"{path}: its metrics are not numbers by name, so `recsys test` has not written it")
    return dict(results)


def results_file(run: str | Path) -> Path:
    """The ``results.json`` of a run that is named by its folder or by that file; it may not exist."""
    path = Path(run)
    return path / "results.json" if path.is_dir() or path.suffix != ".json" else path


def shown_path(word: str) -> str:
    """A path as a report may show it: an absolute one tells of the machine, so what is above the project goes."""
    path = Path(word)
    if not path.is_absolute():
        return word
    if path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd()).as_posix()
    return Path(*path.parts[-2:]).as_posix() if len(path.parts) > 2 else path.name


# ------------------------------------------------------------------------------------------------ runs and their groups


class Run(NamedTuple):
    """A finished run."""

    name: str  # the folder as given
    folder: Path
    results: dict[str, Any]  # of `load_results`


@dataclass(frozen=True)
class Group:
    """Runs of one configuration that differ in their seed alone: a row of a comparison."""

    name: str
    runs: tuple[Run, ...]

    @property
    def model(self) -> str:
        """Name of the model's class."""
        return str(self.runs[0].results["model"])

    def score(self, metric: str) -> "Score | None":
        """Values of a metric, named in full as in ``results.json``; None where no run has a number for it."""
        values = [run.results["metrics"].get(metric) for run in self.runs]
        known = tuple(float(value) for value in values if value is not None and not math.isnan(value))
        return Score(known) if known else None


@dataclass(frozen=True)
class Score:
    """What runs that differ in their seed alone reached on one metric."""

    values: tuple[float, ...]  # one a seed

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Standard deviation over seeds, with n - 1 below the sum; None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def load_run(run: str | Path) -> Run:
    """A run by its folder or its ``results.json``.

    Raises:
        InputError: see `load_results`.
    """
    folder = results_file(run).parent
    return Run(shown_path(folder.as_posix()), folder, load_results(run))


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs by configuration, in the order of the first of each; seeds, places and loggers do not tell runs apart.

    ``seed43``, ``seed=43`` and ``seed-43`` inside strings count as seeds too: a model trained on the semantic IDs of
    ``runs/rqvae/beauty-seed43`` differs from one on those of ``beauty-seed44`` in its seed alone. Runs on different
    data are never of one group.

    Raises:
        InputError: two runs are the same also in their seeds, so that one trained model would count twice.
    """
    groups: dict[str, list[Run]] = {}
    known: dict[str, Run] = {}
    for run in runs:
        identity = _settings_key(run, _PLACE)
        if identity in known:
            raise InputError(
                f"{known[identity].name} and {run.name} are one configuration with the same seed "
                f"({run.results['seed']}): leave one out, or train it with another --seed_everything"
            )
        known[identity] = run
        groups.setdefault(_SEED.sub("seed*", _settings_key(run, (*_PLACE, *_SEEDS))), []).append(run)
    made: list[Group] = []
    for members in groups.values():
        name = _group_name(members)
        taken = sum(group.name == name or group.name.startswith(f"{name} #") for group in made)
        made.append(Group(f"{name} #{taken + 1}" if taken else name, tuple(members)))
    return made


def _settings_key(run: Run, ignored: Collection[str]) -> str:
    config = json.loads(json.dumps(run.results["config"]))  # a copy
    for name in ignored:
        *path, last = name.split(".")
        part = config
        for key in path:
            part = part.get(key) if isinstance(part, dict) else None
        if isinstance(part, dict):
            part.pop(last, None)
    return json.dumps([run.results["model"], run.results["data"].get("fingerprint"), config], sort_keys=True)


def _group_name(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return runs[0].name
    names = {_SEED.sub("seed*", run.name) for run in runs}
    return names.pop() if len(names) == 1 else f"{runs[0].name} ({len(runs)} runs)"


def warnings(groups: Sequence[Group]) -> list[str]:
    """What speaks against comparing these groups at all, one line each."""
    found = []
    fingerprints = {group.name: str(group.runs[0].results["data"].get("fingerprint"))[:12] for group in groups}
    if len(set(fingerprints.values())) > 1:
        each = ", ".join(f"`{name}` {fingerprint}" for name, fingerprint in fingerprints.items())
        found.append(f"**Not comparable**: the runs were measured on different data ({each}).")
    for group in groups:
        if len({run.results["code"].get("sha256") for run in group.runs}) > 1:
            found.append(f"The runs of `{group.name}` were made by different versions of the code.")
    return found


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
