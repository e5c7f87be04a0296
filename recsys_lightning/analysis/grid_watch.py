"""Waiting for the job arrays of a grid: what Slurm says of their tasks, and what these have printed."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence

from recsys_lightning.analysis.grid_execute import Event
from recsys_lightning.analysis.grid_runs import GridRun
from recsys_lightning.analysis.grid_slurm import ENDED, Array, SlurmError, Task
from recsys_lightning.analysis.grid_task import read_events
from recsys_lightning.errors import InputError

_PATIENCE = 600.0  # seconds without an answer of Slurm: a controller may be started anew meanwhile
Queue = Callable[[Sequence[str]], Mapping[str, Sequence[Task]]]


def watch(
    arrays: Sequence[Array], wanted: Sequence[GridRun], queue: Queue, pause: float
) -> Generator[Event, None, None]:
    """Say what happens to runs until none of them is queued or at work.

    Args:
        arrays: that do the runs; those of which no array does any are finished already, and said so first.
        wanted: the runs.
        queue: what Slurm says, as `recsys_lightning.analysis.grid_slurm.queue` does.
        pause: seconds between two looks.

    Raises:
        InputError: Slurm has not answered for ten minutes.
    """
    last: dict[str, Event] = {}
    names = {run.name for run in wanted}
    doing = {name for array in arrays for task in array.plan.tasks for name in task}
    for run in wanted:
        if run.name not in doing:
            yield Event(run.name, "skipped")
    open_tasks = {(array.name, number): array for array in arrays for number in range(len(array.plan.tasks))}
    since = time.monotonic()
    while open_tasks:
        try:
            known = queue(sorted({array.name for array in open_tasks.values()}))
            since = time.monotonic()
        except SlurmError as error:
            if time.monotonic() - since > _PATIENCE:
                raise InputError(f"Slurm does not answer: {error}; its jobs may go on") from error
            time.sleep(pause)
            continue
        for (name, number), array in list(open_tasks.items()):
            state = next((task.state for task in known.get(name, ()) if task.number == number), "")
            news = _news(array, number, state)
            for event in news:
                if event.run in names and last.get(event.run) != event:
                    last[event.run] = event
                    yield event
            if not state or state in ENDED:
                del open_tasks[name, number]
        time.sleep(pause if open_tasks else 0)


def _news(array: Array, number: int, state: str) -> list[Event]:
    """The last that is known of each run of a task."""
    path = array.output(number)
    events, rest = read_events(path.read_text(errors="replace") if path.is_file() else "")
    latest = {event.run: event for event in events}
    if state and state not in ENDED:
        return [_while_queued(latest.get(name), name, state) for name in array.plan.tasks[number]]
    done: list[Event] = []
    for name in array.plan.tasks[number]:
        done.append(_at_the_end(array.plan.runs[name], latest.get(name), state, rest, done))
    return done


def _while_queued(event: Event | None, name: str, state: str) -> Event:
    """A run of a task that may yet be queued again has failed for good only when its task has ended."""
    if event is not None and event.state in ("finished", "skipped"):
        return event
    if state == "PENDING":
        return Event(name, "queued", "to go on" if event else "")
    if event is None or event.state != "started":
        return Event(name, "queued", "with others" if state == "RUNNING" and event is None else "to go on")
    return event


def _at_the_end(run: GridRun, event: Event | None, state: str, rest: Sequence[str], before: Sequence[Event]) -> Event:
    """What has become of a run, of which the last that was heard is `event`."""
    if event is not None and event.state not in ("started", "queued"):
        return event
    try:
        if not run.left():
            return Event(run.name, "finished")
    except InputError as error:
        return Event(run.name, "failed", str(error))
    failed = [one.run for one in before if one.state in ("failed", "not run") and one.run in run.needs]
    if failed:
        return Event(run.name, "not run", f"needs {failed[0]}")
    said = f"; its last line was {rest[-1]!r}" if rest else ""
    return Event(run.name, "failed", f"its job has ended ({state or 'Slurm has forgotten how'}){said}")
