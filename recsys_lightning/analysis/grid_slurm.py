"""Running a grid on a Slurm cluster: what is left of it is submitted as job arrays, once, whoever asks how often.

Beside the run folders lies ``.slurm``: the plan of each array under the name of its job, and what its tasks print. So a
second command knows which runs the jobs of the first are for, as long as Slurm knows these jobs.
"""

import contextlib
import fcntl
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from recsys_lightning.analysis.grid_runs import GridRun
from recsys_lightning.analysis.grid_tasks import Plan, stages
from recsys_lightning.errors import InputError

# Before what the user says, who may want others. Slurm sends the signal to the processes of the run, up to a minute
# early, and what a task prints after it was queued again comes after what it has printed before.
_DEFAULTS = ("--requeue", "--open-mode=append", "--signal=USR1@120")
# Options of sbatch that the grid gives itself.
_TAKEN = {
    **dict.fromkeys(("-a", "--array"), "the runs that are left, and -j"),
    **dict.fromkeys(("-d", "--dependency"), "what the runs need"),
    **dict.fromkeys(("-J", "--job-name"), "the name of the grid"),
    **dict.fromkeys(("-o", "--output", "-e", "--error"), "the folder of the runs"),
    **dict.fromkeys(("--wrap", "-W", "--wait", "--test-only", "--parsable", "-D", "--chdir"), "the launcher"),
}
# States of a job that has ended; in all others it is waiting, at work or about to be queued again.
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)


class SlurmError(Exception):
    """A command of Slurm has failed; holds what it said."""


class Task(NamedTuple):
    """A task of an array as ``squeue`` has it."""

    job: str  # the array's
    number: int
    state: str


@dataclass(frozen=True)
class Array:
    """A job array that does runs of a grid.

    Attributes:
        name: of the job, and of its files.
        job: its number.
        plan: what its tasks do.
        folder: of its files.
    """

    name: str
    job: str
    plan: Plan
    folder: Path

    def output(self, number: int) -> Path:
        """What a task prints."""
        return self.folder / f"{self.name}-{number}.out"


class Launch(NamedTuple):
    """What is at work on the runs of a grid."""

    arrays: list[Array]  # those that were found and then those that were submitted
    submitted: list[Array]


def require_slurm() -> None:
    """Refuse a machine that cannot submit jobs.

    Raises:
        InputError: sbatch is not installed here.
    """
    if shutil.which("sbatch") is None:
        raise InputError(
            "--launcher slurm: there is no sbatch on this machine; run it on a login node of the cluster, or leave out "
            "--launcher to run here"
        )


def sbatch_words(text: str) -> list[str]:
    """The options of ``--sbatch``, split as a shell does.

    Raises:
        InputError: a quote is not closed, it holds something that is no option, or an option is the grid's to give.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--sbatch {text!r}: {error}") from error
    if words and not words[0].startswith("-"):
        raise InputError(f"--sbatch {text!r}: must hold options of sbatch, such as '--partition=gpu --time=4:00:00'")
    for word in words:
        name = word.partition("=")[0] if word.startswith("--") else word[:2]
        if word.startswith("-") and name in _TAKEN:
            raise InputError(f"--sbatch: {name} comes from {_TAKEN[name]}; leave it out")
    return words


def launch(
    root: Path, wanted: Sequence[GridRun], runs: Mapping[str, GridRun], options: Sequence[str], jobs: int | None
) -> Launch:
    """See to it that all that is left of the wanted runs is queued: what is not yet is submitted.

    Args:
        root: folder of the run folders; the names of the jobs begin with its name.
        wanted: runs, with all that they need.
        runs: all runs of the grid by name.
        options: words of sbatch.
        jobs: tasks of an array at a time; None leaves that to Slurm.

    Raises:
        InputError: Slurm refuses the jobs, of which then none is left, or has jobs of the same runs with other
            settings.
    """
    folder = root / ".slurm"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / "lock"):
        found = _queued_arrays(folder)
        busy = {
            name: f"{array.job}_{number}"
            for array, tasks in found
            for number in tasks
            for name in array.plan.tasks[number]
        }
        planned = {
            name: array.plan.runs[name]
            for array, tasks in found
            for number in tasks
            for name in array.plan.tasks[number]
        }
        for name, run in planned.items():
            if name in runs and run.settings != runs[name].settings:
                raise InputError(
                    f"{run.folder} is queued as job {busy[name]} with other settings than the grid now has: set them "
                    f"back, or drop that job with `scancel {busy[name]}`"
                )
        left = [run for run in wanted if run.name not in busy and run.left()]
        submitted = _submit_all(root.name, folder, stages(left, runs), busy, options, jobs)
    return Launch([array for array, _ in found] + submitted, submitted)


def array_name(word: str, token: str, number: int) -> str:
    """Name of a job: what it is of, what no other has, and its place among those that are submitted with it."""
    return f"{re.sub('[^A-Za-z0-9._-]', '-', word)}-{token}-{number}"


def submission(
    name: str, folder: Path, tasks: int, after: Sequence[str], options: Sequence[str], jobs: int | None
) -> list[str]:
    """The command that submits an array.

    Args:
        name: of the job; its plan lies under that name.
        folder: of the plan.
        tasks: how many.
        after: jobs that must have ended.
        options: words of sbatch.
        jobs: tasks at a time; None leaves that to Slurm.
    """
    limit = f"%{jobs}" if jobs is not None else ""
    program = [sys.executable, "-m", "recsys_lightning.analysis.grid_task", str(folder / f"{name}.json")]
    own = [
        f"--job-name={name}",
        f"--array=0-{tasks - 1}{limit}",
        f"--output={folder / f'{name}-%a.out'}",
        *([f"--dependency=afterany:{':'.join(after)}"] if after else []),
        # bash gives way to the task, which is then what Slurm signals.
        f"--wrap=exec {shlex.join(program)} $SLURM_ARRAY_TASK_ID",
    ]
    return ["sbatch", "--parsable", *_DEFAULTS, *options, *own]


def queue(names: Sequence[str]) -> dict[str, list[Task]]:
    """The tasks of the jobs of some names, by name; those that ended lately are among them.

    Raises:
        SlurmError: Slurm does not answer.
    """
    if not names:
        return {}
    words = [
        "squeue",
        "--me",
        "--noheader",
        "--array",
        "--states=all",
        "--format=%j|%F|%K|%T",
        f"--name={','.join(names)}",
    ]
    tasks: dict[str, list[Task]] = {}
    for line in _ask(words).splitlines():
        name, job, number, state = line.split("|")
        if number.isdigit():
            tasks.setdefault(name, []).append(Task(job, int(number), state))
    return tasks


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep a second command from submitting the same at the same time."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _queued_arrays(folder: Path) -> list[tuple[Array, list[int]]]:
    """The arrays of this folder that have not ended, and which of their tasks."""
    plans = {path.stem: path for path in sorted(folder.glob("*.json"))}
    try:
        known = queue(list(plans))
    except SlurmError as error:
        raise InputError(f"Slurm does not answer: {error}") from error
    found = []
    for name, path in plans.items():
        tasks = [task for task in known.get(name, []) if task.state not in ENDED]
        if tasks:
            found.append((Array(name, tasks[0].job, Plan.read(path), folder), [task.number for task in tasks]))
        else:
            path.unlink()  # what its tasks have printed stays
    return found


def _submit_all(
    word: str, folder: Path, plans: Sequence[Plan], busy: Mapping[str, str], options: Sequence[str], jobs: int | None
) -> list[Array]:
    arrays: list[Array] = []
    token = uuid.uuid4().hex[:8]
    try:
        for number, plan in enumerate(plans):
            name = array_name(word, token, number)
            needed = {need for task in plan.tasks for run in task for need in plan.runs[run].needs}
            after = [array.job for array in arrays[-1:]] + sorted({busy[need] for need in needed if need in busy})
            plan.write(folder / f"{name}.json")
            words = submission(name, folder, len(plan.tasks), after, options, jobs)
            arrays.append(Array(name, _ask(words).strip().partition(";")[0], plan, folder))
    except SlurmError as error:
        (folder / f"{name}.json").unlink()
        for array in arrays:
            with contextlib.suppress(SlurmError):
                _ask(["scancel", array.job])
            (folder / f"{array.name}.json").unlink()
        given = f" {shlex.join(options)}" if options else ""
        raise InputError(f"Slurm refuses the jobs (sbatch{given}): {error}; nothing was submitted") from error
    return arrays


def _ask(words: Sequence[str]) -> str:
    """What a command of Slurm prints."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(str(error)) from error
    if done.returncode:
        lines = [re.sub(rf"^({words[0]}: )?(error: )?", "", line) for line in done.stderr.splitlines() if line.strip()]
        raise SlurmError("; ".join(lines) or f"{words[0]} ended with status {done.returncode}")
    return done.stdout
