"""`recsys ablate`."""

import argparse
import contextlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from recsys_lightning.analysis import grid_slurm
from recsys_lightning.analysis.grid import Grid, load_grid
from recsys_lightning.analysis.grid_execute import PROGRAM, Event, environment_of, execute
from recsys_lightning.analysis.grid_progress import Progress
from recsys_lightning.analysis.grid_runs import GridRun, chosen, expand
from recsys_lightning.analysis.grid_tasks import stages
from recsys_lightning.analysis.grid_watch import watch
from recsys_lightning.analysis.groups import shown_path
from recsys_lightning.cli.ablate_check import check
from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing

FOLDER = Path("runs/ablations")
_OWN = ("-h", "--help", "-j", "--jobs", "--only", "--dry-run", "--runs", "--report", "--launcher", "--sbatch")
_SLURM_PAUSE = 5.0  # seconds between two questions to Slurm, which answers many users


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
    root = given.runs or FOLDER / grid.path.stem
    runs = expand(grid, root, options)
    wanted = chosen(grid, runs, given.only or [])
    if grid.report is not None:
        from recsys_lightning.analysis.figures import require_matplotlib

        require_matplotlib()  # before the work, not after it
    if given.launcher == "slurm" and not given.dry_run:
        grid_slurm.require_slurm()
    check(grid, runs)
    if given.dry_run:
        _show_plan(wanted)
        if given.launcher == "slurm":
            _show_arrays(root, wanted, runs, given)
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    if given.launcher == "slurm":
        ended = _run_on_slurm(grid, root, wanted, runs, given, console)
    else:
        ended = _run(grid, wanted, given.jobs or 1, console)
    _report(grid, runs, ended, console, shlex.join(["recsys", *map(shown_path, arguments)]))
    if any(event.state in ("failed", "not run") for event in ended.values()):
        raise SystemExit(1)


# ------------------------------------------------------------------------------------------------------------ the work


def _show_plan(runs: Sequence[GridRun]) -> None:
    """What would be run."""
    for run in runs:
        left = run.left()
        after = f" (after {', '.join(run.needs)})" if run.needs and left else ""
        sys.stdout.write(f"{run.name}: {'to run' if left else 'finished'}{after}\n")
        for verb in left:
            sys.stdout.write(f"  recsys {shlex.join(run.command(verb))}\n")


def _show_arrays(root: Path, wanted: Sequence[GridRun], runs: Mapping[str, GridRun], given: argparse.Namespace) -> None:
    """The commands that would submit what is left, as if nothing of it were queued yet."""
    before: list[str] = []
    for number, plan in enumerate(stages([run for run in wanted if run.left()], runs)):
        name = grid_slurm.array_name(root.name, "ID", number)
        words = grid_slurm.submission(name, root / ".slurm", len(plan.tasks), before, given.sbatch, given.jobs)
        sys.stdout.write(f"{shlex.join(words)}\n")
        before = [f"JOB{number}"]


def _run(grid: Grid, runs: Sequence[GridRun], jobs: int, console: Console) -> dict[str, Event]:
    """Run them; returns the last event of each."""
    gpus = _gpus() if jobs > 1 else []
    events = execute(runs, jobs, lambda slot: environment_of(slot, jobs, gpus, os.environ), PROGRAM)
    return _followed(events, Progress(grid, runs, console))


def _run_on_slurm(
    grid: Grid,
    root: Path,
    wanted: Sequence[GridRun],
    runs: Mapping[str, GridRun],
    given: argparse.Namespace,
    console: Console,
) -> dict[str, Event]:
    """Have Slurm run what is left, and wait for that; returns the last event of each run."""
    launched = grid_slurm.launch(root, wanted, runs, given.sbatch, given.jobs)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    for array in launched.arrays:
        what = "submitted" if array in launched.submitted else "found, submitted before:"
        say(f"{what} job {array.job}, {len(array.plan.tasks)} tasks (squeue --name={array.name})")
    events = watch(launched.arrays, wanted, grid_slurm.queue, _SLURM_PAUSE)
    try:
        return _followed(events, Progress(grid, wanted, console, unfinished="at work"))
    except (KeyboardInterrupt, SystemExit):
        jobs = " ".join(array.job for array in launched.arrays)
        say(f"The jobs go on; the same command waits for them again. To end them: scancel {jobs}")
        raise


def _followed(events: Generator[Event, None, None], progress: Progress) -> dict[str, Event]:
    """Show all that happens; returns the last event of each run."""
    last: dict[str, Event] = {}
    # Closing ends the processes of this machine, whatever ends this one.
    with _sigterm_raises(), contextlib.closing(events), progress:
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
    for word in _with_sbatch_joined(words):
        if re.match(r"--?[A-Za-z]", word):
            name = word.partition("=")[0]
            target = own if name in _OWN or re.fullmatch(r"-j\d+", word) else passed
        target.append(word)
    parser = _Parser(
        prog="recsys ablate",
        usage="recsys ablate FILE [-j N] [--launcher slurm] [--sbatch OPTIONS] [--only NAME ...] [--dry-run] "
        "[--runs DIR] [--report FILE] [--KEY VALUE ...]",
        description="Run an ablation grid: what is finished is skipped, what was broken off goes on, and all is "
        "compared at the end. Other options, given after FILE, go to every run: --trainer.max_epochs 1.",
        epilog="The exit status is 0 if all is finished, 1 if a run failed, 2 if the grid cannot be used.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="the grid, such as experiments/ablations/demo.yaml")
    jobs = "runs at a time (default: 1, which then share out the GPUs; on Slurm as many as it lets run)"
    add("-j", "--jobs", type=int, metavar="N", help=jobs)
    add(
        "--launcher",
        choices=("local", "slurm"),
        default="local",
        help="where: here, or as job arrays of a Slurm cluster",
    )
    sbatch = "options of sbatch for each run, such as '--partition=gpu --gres=gpu:1 --time=4:00:00'"
    add("--sbatch", metavar="OPTIONS", help=sbatch)
    add("--only", nargs="+", metavar="NAME", help="run these entries of the grid and what they need")
    add("--dry-run", action="store_true", help="print what would be run")
    add("--runs", type=Path, metavar="DIR", help=f"folder of the runs (default: {FOLDER}/ and the name of FILE)")
    add("--report", type=Path, metavar="FILE", help="Markdown file of the comparison (default: what the grid says)")
    given = parser.parse_args(own)
    if given.jobs is not None and given.jobs < 1:
        parser.error(f"--jobs {given.jobs}: must be at least 1")
    if given.sbatch is not None and given.launcher != "slurm":
        parser.error("--sbatch is for --launcher slurm")
    given.sbatch = grid_slurm.sbatch_words(given.sbatch or "")
    return given, passed


def _with_sbatch_joined(words: Sequence[str]) -> list[str]:
    """The words with ``--sbatch`` and the one after it as one, since that begins with a dash itself."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--sbatch":
            joined[-1] = f"--sbatch={word}"
        else:
            joined.append(word)
    return joined
