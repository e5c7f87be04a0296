"""What is left of a grid, shared out into the tasks of job arrays, and the file in which a task finds what to do."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recsys_lightning.analysis.grid import Entry
from recsys_lightning.analysis.grid_runs import GridRun
from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing


@dataclass(frozen=True)
class Plan:
    """The tasks of one job array.

    Attributes:
        tasks: names of the runs of each, in the order in which it does them.
        runs: by name, those of the tasks and those that they need.
    """

    tasks: tuple[tuple[str, ...], ...]
    runs: dict[str, GridRun]

    def write(self, path: Path) -> None:
        """Write it to a JSON file."""
        runs = {name: _as_json(run) for name, run in self.runs.items()}
        with replacing(path) as file:
            file.write(json.dumps({"tasks": self.tasks, "runs": runs}, indent=1).encode())

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read it from such a file.

        Raises:
            InputError: there is no such file, or it is none of ours.
        """
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                tuple(map(tuple, given["tasks"])), {name: _run(name, run) for name, run in given["runs"].items()}
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no plan of a job array: {type(error).__name__}: {error}") from error


def stages(todo: Sequence[GridRun], runs: Mapping[str, GridRun]) -> list[Plan]:
    """Job arrays that do what is left: each needs nothing but what those before it have done.

    A run that only tests the weights of another one follows it in the same task, so that most grids are one array, or
    two if some runs must be trained before all others.

    Args:
        todo: runs that are left, in the order of the grid.
        runs: all runs of the grid by name.
    """
    tasks = _tasks(todo)
    task_of = {run.name: number for number, task in enumerate(tasks) for run in task}
    depth: dict[int, int] = {}

    def deep(number: int) -> int:
        if number not in depth:
            needed = {task_of[name] for run in tasks[number] for name in run.needs if name in task_of} - {number}
            depth[number] = max((deep(one) + 1 for one in needed), default=0)
        return depth[number]

    last = max(map(deep, range(len(tasks))), default=-1)
    layers = [[task for number, task in enumerate(tasks) if depth[number] == level] for level in range(last + 1)]
    return [_plan(layer, runs) for layer in layers]


def _tasks(todo: Sequence[GridRun]) -> list[list[GridRun]]:
    trained = {run.folder: run for run in todo if run.checkpoint is None}
    tasks = {run.name: [run] for run in todo}
    left = {run.name for run in todo}
    for run in todo:
        source = trained.get(run.checkpoint.parents[1]) if run.checkpoint else None
        # What else it needs must be there by then, too.
        if source is not None and not (set(run.needs) - {source.name} - set(source.needs)) & left:
            tasks[source.name].append(run)
            del tasks[run.name]
    return list(tasks.values())


def _plan(tasks: Sequence[Sequence[GridRun]], runs: Mapping[str, GridRun]) -> Plan:
    names = dict.fromkeys(name for task in tasks for run in task for name in (run.name, *run.needs))
    return Plan(tuple(tuple(run.name for run in task) for task in tasks), {name: runs[name] for name in names})


def _as_json(run: GridRun) -> dict[str, object]:
    return {
        "entry": run.entry.name,
        "base": run.entry.base.as_posix(),
        "first": run.entry.first,
        "seed": run.seed,
        "folder": run.folder.as_posix(),
        "settings": run.settings,
        "needs": run.needs,
        "checkpoint": run.checkpoint.as_posix() if run.checkpoint else None,
    }


def _run(name: str, given: Mapping[str, object]) -> GridRun:
    """What is needed of a run to do it; its settings are words by now."""
    entry = Entry(str(given["entry"]), Path(str(given["base"])), {}, {}, first=bool(given["first"]))
    settings, needs, seed = given["settings"], given["needs"], given["seed"]
    if not isinstance(settings, list) or not isinstance(needs, list) or not isinstance(seed, int | None):
        raise TypeError(f"run {name}: settings and needs are lists, seed is a number")
    checkpoint = Path(str(given["checkpoint"])) if given["checkpoint"] else None
    folder = Path(str(given["folder"]))
    return GridRun(name, entry, seed, folder, tuple(map(str, settings)), tuple(map(str, needs)), checkpoint)
