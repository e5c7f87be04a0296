"""What `recsys ablate` checks first: the settings of all runs, and whether earlier runs were made with the same."""

import contextlib
import io
import itertools
from collections.abc import Mapping
from typing import Any

import yaml

from recsys_lightning.analysis.grid import Grid
from recsys_lightning.analysis.grid_runs import GridRun, differences, identity, recorded, refuse_changed
from recsys_lightning.errors import InputError


def check(grid: Grid, runs: Mapping[str, GridRun]) -> None:
    """Parse the settings of all runs, so that whatever is wrong with them is said before anything is run.

    Args:
        grid: the grid.
        runs: all of its runs by name.

    Raises:
        InputError: settings cannot be used, two variants are the same, a metric would not be measured, or a run was
            made with other settings than the grid now has.
    """
    configs: dict[str, dict[str, Any]] = {}  # by run: one a variant, and all that have something to be compared with
    changes: dict[str, list[tuple[str, object, object]]] = {}
    seen: set[str] = set()
    for run in runs.values():
        known = recorded(run)
        if run.entry.name in seen and not known:
            continue
        seen.add(run.entry.name)
        configs[run.name] = config = _resolved(grid, run)
        if known:
            from recsys_lightning.cli.messages import written_keys

            written = written_keys(["fit", *run.settings])
            found = {key: (key, old, new) for one in known for key, old, new in differences(one, config, written)}
            changes[run.name] = list(found.values())
    _refuse_twins(grid, runs, configs)
    _check_metrics(grid, next(configs[run.name] for run in runs.values() if not run.entry.first))
    refuse_changed(runs, changes)


def _resolved(grid: Grid, run: GridRun) -> dict[str, Any]:
    """The configuration that a run would have."""
    from recsys_lightning.cli.trainer import run as run_command

    out = io.StringIO()
    verb = "test" if run.checkpoint else "fit"
    place = f"{grid.path}: {run.entry.name}"
    with contextlib.redirect_stdout(out):
        try:
            run_command([verb, *run.settings, "--print_config"])
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        except SystemExit:  # once it is printed
            pass
    config: dict[str, Any] = yaml.safe_load(out.getvalue())
    wrong = [name for name, value in (("run_dir", run.folder.as_posix()), ("ckpt_path", None))
             if config.get(name) != value]  # fmt: skip
    if run.seed is not None and config["seed_everything"] != run.seed:
        wrong.append("seed_everything")
    if wrong:
        raise InputError(f"{place}: its settings give {wrong[0]}, which is the grid's to give; leave it out")
    return config


def _refuse_twins(grid: Grid, runs: Mapping[str, GridRun], configs: Mapping[str, dict[str, Any]]) -> None:
    """Two rows that are the same by all their settings would be one difference too few."""
    own = [(runs[name].entry, identity(config)) for name, config in configs.items() if runs[name].seed == grid.seeds[0]]
    for (one, what), (other, same) in itertools.combinations(own, 2):
        # The weights of a variant, tested with its own settings, are that variant.
        if what == same and (one.weights == other.weights or one.weights == other.name or other.weights == one.name):
            raise InputError(f"{grid.path}: {one.name} and {other.name} are the same by all their settings; drop one")


def _check_metrics(grid: Grid, config: Mapping[str, Any]) -> None:
    """Refuse a metric that the runs would not have: hours later it would be too late."""
    measured = config["model"].get("init_args", {}).get("evaluation")
    if not measured:
        return
    for metric in grid.metrics:
        name, at, k = metric.rpartition("/")[2].partition("@")
        similar = [known for known in measured["metrics"] if _alike(name, known)]
        if at and (k not in map(str, measured["ks"]) or similar):
            names, ks = ", ".join(measured["metrics"]), ", ".join(map(str, measured["ks"]))
            hint = f"; did you mean {similar[0]}?" if similar else ""
            raise InputError(f"{grid.path}: metrics: the runs measure {names} at {ks}, not {metric!r}{hint}")


def _alike(name: str, known: str) -> bool:
    from difflib import SequenceMatcher

    return name != known and SequenceMatcher(None, name, known).ratio() > 0.8
