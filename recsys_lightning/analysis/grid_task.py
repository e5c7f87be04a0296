"""What one task of a job array does: ``python -m recsys_lightning.analysis.grid_task PLAN NUMBER`` under Slurm.

It prints an event a line, as JSON, which the program that has submitted the array reads.
"""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from recsys_lightning.analysis.grid_execute import PROGRAM, Event, execute
from recsys_lightning.analysis.grid_tasks import Plan
from recsys_lightning.errors import InputError

# srun starts as many processes as the job has tasks, and passes signals on to them.
_PROGRAM = ("srun", "--kill-on-bad-exit=1", *PROGRAM)


def main(arguments: Sequence[str], program: Sequence[str] = _PROGRAM) -> int:
    """Do a task; returns the exit status: 0, 1 if a run has failed or could not be run, 2 without a plan.

    Args:
        arguments: file of the `Plan`, and number of the task.
        program: words that a command line begins with.
    """
    path, number = Path(arguments[0]), int(arguments[1])
    # Slurm signals this process as well as those of the runs. They save and end; this one must outlive them, since the
    # whole job is over as soon as it is. A handler that does nothing is not passed on to them, ignoring would be.
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, lambda *_: None)
    try:
        plan = Plan.read(path)
        events = list(_told(perform(plan, number, _environment(os.environ), program)))
    except InputError as error:
        sys.stderr.write(f"recsys: error: {error}\n")
        return 2
    return int(any(event.state in ("failed", "not run") for event in events))


def perform(plan: Plan, number: int, environment: Mapping[str, str], program: Sequence[str]) -> Iterator[Event]:
    """Do what is left of the runs of a task, one after the other.

    Args:
        plan: of the job array.
        number: of the task.
        environment: variables of the processes.
        program: words that a command line begins with.
    """
    own = plan.tasks[number]
    runs, missing = [], dict[str, str]()
    for run in (plan.runs[name] for name in own):
        before = next((name for name in run.needs if name in missing), None)
        before = before or next((name for name in run.needs if name not in own and _is_left(plan, name)), None)
        if before is None:
            runs.append(dataclasses.replace(run, needs=tuple(name for name in run.needs if name in own)))
        else:
            missing[run.name] = before
            yield Event(run.name, "not run", f"needs {before}")
    yield from execute(runs, 1, lambda _: environment, program)


def read_events(text: str) -> tuple[list[Event], list[str]]:
    """The events in the output of a task, and the lines of others below the last of them."""
    events, rest = list[Event](), list[str]()
    for line in text.splitlines():
        try:
            events.append(Event(**json.loads(line)))
            rest = []
        except (ValueError, TypeError):
            rest += [line.strip()] if line.strip() else []
    return events, rest


def _told(events: Iterator[Event]) -> Iterator[Event]:
    for event in events:
        sys.stdout.write(json.dumps(event._asdict()) + "\n")
        sys.stdout.flush()
        yield event


def _is_left(plan: Plan, name: str) -> bool:
    try:
        return bool(plan.runs[name].left())
    except InputError:  # a damaged results.json
        return True


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    """Since 22.05, srun takes the cores of a process from a variable that sbatch does not set."""
    cores = own.get("SLURM_CPUS_PER_TASK")
    return {**own, **({"SRUN_CPUS_PER_TASK": cores} if cores else {})}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
