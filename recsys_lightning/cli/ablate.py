"""`recsys ablate`."""

import argparse
import contextlib
import io
import itertools
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from rich.console import Console

from recsys_lightning.analysis.grid import Grid, load_grid
from recsys_lightning.analysis.grid_execute import PROGRAM, Event, environment_of, execute
from recsys_lightning.analysis.grid_progress import Progress
from recsys_lightning.analysis.grid_runs import (
    GridRun,
    chosen,
    differences,
    expand,
    identity,
    leaves,
    recorded,
    refuse_changed,
)
from recsys_lightning.analysis.groups import shown_path
from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing

FOLDER = Path("runs/ablations")
_OWN = ("-h", "--help", "-j", "--jobs", "--only", "--dry-run", "--runs", "--report")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"ablate: {message}; see `recsys ablate --help`")


def run(arguments: Sequence[str]) -> None:
    """Run what is left of a grid, and compare its variants.

    Raises:
        InputError: the grid or its settings cannot be used, or runs were made with other settings; nothing was run.
        SystemExit: with status 1, a run has failed.
    """
    given, options = _parsed(arguments[1:])
    grid = load_grid(given.file, given.report)
    runs = expand(grid, given.runs or FOLDER / grid.path.stem, options)
    wanted = chosen(grid, runs, given.only or [])
    if grid.report is not None:
        from recsys_lightning.analysis.figures import require_matplotlib

        require_matplotlib()  # before the work, not after it
    _check(grid, runs)
    if given.dry_run:
        _show_plan(wanted)
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    ended = _run(grid, wanted, given.jobs, console)
    _report(grid, runs, ended, console, shlex.join(["recsys", *map(shown_path, arguments)]))
    if any(event.state in ("failed", "not run") for event in ended.values()):
        raise SystemExit(1)


# ------------------------------------------------------------------------------------------------------- the checks


def _check(grid: Grid, runs: Mapping[str, GridRun]) -> None:
    """Parse the settings of all runs, so that whatever is wrong with them is said before anything is run."""
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
            written = _written(run)
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


def _written(run: GridRun) -> set[str]:
    """The keys that the files and the command line of a run name, without ``init_args`` and ``class_path``."""
    from recsys_lightning.cli.messages import read_settings

    keys = set()
    for setting in read_settings(["fit", *run.settings]):
        if setting.value.startswith("{"):
            inner = (key for key, _ in leaves(yaml.safe_load(setting.value), setting.key))
            keys |= {key.replace(".init_args", "").replace(".class_path", "") for key in inner}
        elif setting.value:
            keys.add(setting.key)
    return keys


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


# ------------------------------------------------------------------------------------------------------------ the work


def _show_plan(runs: Sequence[GridRun]) -> None:
    """What would be run."""
    for run in runs:
        left = run.left()
        after = f" (after {', '.join(run.needs)})" if run.needs and left else ""
        sys.stdout.write(f"{run.name}: {'to run' if left else 'finished'}{after}\n")
        for verb in left:
            sys.stdout.write(f"  recsys {shlex.join(run.command(verb))}\n")


def _run(grid: Grid, runs: Sequence[GridRun], jobs: int, console: Console) -> dict[str, Event]:
    """Run them; returns the last event of each."""
    last: dict[str, Event] = {}
    gpus = _gpus() if jobs > 1 else []
    events = execute(runs, jobs, lambda slot: environment_of(slot, jobs, gpus, os.environ), PROGRAM)
    # Closing ends the processes, whatever ends this one.
    with _sigterm_raises(), contextlib.closing(events), Progress(grid, runs, console) as progress:
        for event in events:
            last[event.run] = event
            progress.show(event)
    return last


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let a SIGTERM unwind the stack, as Ctrl+C does."""

    def stop(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(
    grid: Grid, runs: Mapping[str, GridRun], ended: Mapping[str, Event], console: Console, command: str
) -> None:
    """Print the comparison of what is finished, now or before, and write it where the grid says so."""
    from recsys_lightning.analysis.grid_report import report

    variants = [run for run in runs.values() if not run.entry.first]
    unfinished = {run.name: _why(ended.get(run.name)) for run in variants if run.left()}
    if len(unfinished) == len(variants):
        console.print("No variant is finished: there is nothing to compare.")
        return
    made = report(grid, runs, unfinished, command)
    for table in made.tables:
        console.print(table)
    for remark in made.remarks:
        console.print(remark.replace("**", "").replace("`", ""), markup=False, highlight=False)
    for path, content in made.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content)
    if grid.report is not None:
        console.print(f"Written to {grid.report}", markup=False, highlight=False)


def _why(event: Event | None) -> str:
    """Why a run is not finished."""
    return f"{event.state}: {event.detail}" if event else "which was not asked for"


# ---------------------------------------------------------------------------------------------------- the command line


def _parsed(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and the words that are for the runs."""
    own: list[str] = []
    passed: list[str] = []
    target = own
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name = word.partition("=")[0]
            target = own if name in _OWN or re.fullmatch(r"-j\d+", word) else passed
        target.append(word)
    parser = _Parser(
        prog="recsys ablate",
        usage="recsys ablate FILE [-j N] [--only NAME ...] [--dry-run] [--runs DIR] [--report FILE] [--KEY VALUE ...]",
        description="Run an ablation grid: what is finished is skipped, what was broken off goes on, and all is "
        "compared at the end. Other options, given after FILE, go to every run: --trainer.max_epochs 1.",
        epilog="The exit status is 0 if all is finished, 1 if a run failed, 2 if the grid cannot be used.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="the grid, such as experiments/ablations/demo.yaml")
    add("-j", "--jobs", type=int, default=1, metavar="N", help="runs at a time; they share out the GPUs (default: 1)")
    add("--only", nargs="+", metavar="NAME", help="run these entries of the grid and what they need")
    add("--dry-run", action="store_true", help="print what would be run")
    add("--runs", type=Path, metavar="DIR", help=f"folder of the runs (default: {FOLDER}/ and the name of FILE)")
    add("--report", type=Path, metavar="FILE", help="Markdown file of the comparison (default: what the grid says)")
    given = parser.parse_args(own)
    if given.jobs < 1:
        parser.error(f"--jobs {given.jobs}: must be at least 1")
    return given, passed
