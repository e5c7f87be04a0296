"""Running a grid on this machine: each run is a process of its own, several at a time, what others need first."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from recsys_lightning.analysis.grid_runs import GridRun
from recsys_lightning.errors import InputError

PROGRAM = (sys.executable, "-m", "recsys_lightning")
_GRACE = 10.0  # seconds that a process gets to end when the grid is stopped
_PAUSE = 0.1  # seconds between two looks at the processes

# What flock answers on file systems that know no locks, as some of clusters are.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

State = Literal["queued", "started", "finished", "skipped", "failed", "not run"]


class Event(NamedTuple):
    """Something that happened to a run.

    Attributes:
        run: name of the run.
        state: ``queued`` waits for a place on a cluster; ``skipped`` was finished before; ``not run`` needs a run that
            has failed.
        detail: the command that started, or why the run is queued again, failed or was not run.
        seconds: since the run started.
    """

    run: str
    state: State
    detail: str = ""
    seconds: float = 0.0


@dataclass
class _Active:
    """A run that is being run."""

    run: GridRun
    slot: int
    log: BinaryIO  # appended to; holding it locked is what keeps other processes off this run
    started: float
    process: subprocess.Popen[bytes]
    verb: str
    log_start: int  # where the output of this command begins


def execute(
    runs: Sequence[GridRun],
    jobs: int,
    environment: Callable[[int], Mapping[str, str]],
    program: Sequence[str],
) -> Generator[Event, None, None]:
    """Run what is left of the runs, and say what happens. A run that fails stops none but those that need it.

    Closing the iterator ends the processes.

    Args:
        runs: with all that they need.
        jobs: how many at a time.
        environment: variables of the process in a slot, 0 to jobs - 1.
        program: words that a command line begins with.
    """
    waiting, ended, active = list(runs), dict[str, bool](), list[_Active]()
    try:
        while waiting or active:
            for run in list(waiting):
                failed = [needed for needed in run.needs if ended.get(needed) is False]
                if failed:
                    event = Event(run.name, "not run", f"needs {failed[0]}")
                elif len(active) < jobs and all(needed in ended for needed in run.needs):
                    slot = min(set(range(jobs)) - {one.slot for one in active})
                    event = _start(run, slot, active, environment(slot), program)
                else:
                    continue
                waiting.remove(run)
                if event.state != "started":
                    ended[run.name] = event.state == "skipped"
                yield event
            for one in list(active):
                news = _look(one, environment(one.slot), program)
                if news is None:
                    continue
                if news.state != "started":
                    ended[news.run] = news.state == "finished"
                    active.remove(one)
                    one.log.close()
                yield news
            time.sleep(_PAUSE if active else 0)
    finally:
        _end(active)


def _start(
    run: GridRun, slot: int, active: list[_Active], environment: Mapping[str, str], program: Sequence[str]
) -> Event:
    run.log.parent.mkdir(parents=True, exist_ok=True)
    log = run.log.open("ab")
    try:
        # The process inherits the lock: it holds for as long as the process lives, whatever becomes of this one.
        _lock(log)
        left = run.left()  # only now: another process may just have finished it
        if left:
            process, at = _launch(run, left[0], log, environment, program)
            active.append(_Active(run, slot, log, time.monotonic(), process, left[0], at))
            return Event(run.name, "started", left[0])
    except BlockingIOError:
        log.close()
        return Event(run.name, "failed", f"another process is at work on it and writes {run.log}")
    except InputError as error:
        log.close()
        return Event(run.name, "failed", str(error))
    log.close()
    return Event(run.name, "skipped")


def _lock(log: BinaryIO) -> None:
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.write(f"{log.name} cannot be locked here: see to it that no other process does this run\n".encode())


def _launch(
    run: GridRun, verb: str, log: BinaryIO, environment: Mapping[str, str], program: Sequence[str]
) -> tuple[subprocess.Popen[bytes], int]:
    words = run.command(verb)
    log.write(f"$ recsys {' '.join(words)}\n".encode())
    log.flush()
    at = log.tell()
    command = [*program, *words]
    process = subprocess.Popen(  # noqa: S603 - our own program, no shell
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=dict(environment)
    )
    return process, at


def _look(one: _Active, environment: Mapping[str, str], program: Sequence[str]) -> Event | None:
    """What has happened to a run; None while its process is at work. A run that has more to do goes on with that."""
    status = one.process.poll()
    if status is None:
        return None
    name, seconds = one.run.name, time.monotonic() - one.started
    if status != 0:
        return Event(name, "failed", _last_error(one.run.log, one.log_start, status), seconds)
    try:
        left = one.run.left()
    except InputError as error:
        return Event(name, "failed", str(error), seconds)
    if not left:
        return Event(name, "finished", "", seconds)
    if left[0] == one.verb:
        return Event(name, "failed", f"`recsys {one.verb}` ended well but left no results in {one.run.folder}", seconds)
    one.verb = left[0]
    one.process, one.log_start = _launch(one.run, one.verb, one.log, environment, program)
    return Event(name, "started", one.verb, seconds)


def _last_error(log: Path, start: int, status: int) -> str:
    """The last line of a failed command that names an error, else one of Slurm's that does, else its last line."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"recsys: error: |[\w.]*(Error|Exception|Interrupt)\b", line)]
    # What Slurm says of the end of one process that has said nothing, before what it then does to the others.
    named = named or [line for line in lines if re.match(r"slurmstepd[\w.-]*: error: |srun: error: .*: task", line)][:1]
    if status < 0:
        ended = f"ended by {signal.Signals(-status).name}"
        return f"{ended}; its last line was {lines[-1]!r}" if lines else ended
    last = (named or lines or [f"exit status {status} and not a word"])[-1]
    return last.removeprefix("recsys: error: ")


def _end(active: Sequence[_Active]) -> None:
    for one in active:
        if one.process.poll() is None:
            one.process.terminate()
    until = time.monotonic() + _GRACE
    for one in active:
        try:
            one.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
        one.log.close()


def environment_of(slot: int, jobs: int, gpus: Sequence[str], own: Mapping[str, str]) -> dict[str, str]:
    """Variables of the process in one of several slots: with more than one, they share the cores and the GPUs out.

    Args:
        slot: 0 to jobs - 1.
        jobs: number of slots; a single one gets everything.
        gpus: names of the GPUs, as in ``CUDA_VISIBLE_DEVICES``.
        own: variables of this process; a number of threads that it has is kept.
    """
    shared: dict[str, str] = {}
    if jobs > 1:
        shared["OMP_NUM_THREADS"] = own.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        if gpus:
            shared["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return {**own, **shared}
