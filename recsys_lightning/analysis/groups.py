"""Runs by their folders, and those that differ in their seed alone as one group."""

import json
import math
import re
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from recsys_lightning.errors import InputError

# What a table or a report is made of; every run writes them all.
_PARTS = ("metrics", "run", "model", "seed", "data", "hardware", "seconds_by_command", "code", "config")

# Keys of a configuration that say where a run lies, which command came last and what is watched, not what was trained.
PLACES = (
    "run_dir",
    "ckpt_path",
    "verbose",
    "weights_only",
    "trainer.logger",
    "trainer.default_root_dir",
    "checkpoint.dirpath",
    "codebook_health",
)
_SEEDS = ("seed_everything", "data.init_args.seed")
_SEED = re.compile(r"(?<![a-z])seed[=_-]?\d+", re.IGNORECASE)  # as in runs/cobra/beauty-seed43


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
        identity = _settings_key(run, PLACES)
        if identity in known:
            raise InputError(
                f"{known[identity].name} and {run.name} are one configuration with the same seed "
                f"({run.results['seed']}): leave one out, or train it with another --seed_everything"
            )
        known[identity] = run
        groups.setdefault(_SEED.sub("seed*", _settings_key(run, (*PLACES, *_SEEDS))), []).append(run)
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
