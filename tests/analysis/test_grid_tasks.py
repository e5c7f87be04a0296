"""What is left of a grid becomes job arrays, each of which needs only those before it, and a task does its share."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from recsys_lightning.analysis.grid import Entry
from recsys_lightning.analysis.grid_runs import GridRun
from recsys_lightning.analysis.grid_task import main, perform, read_events
from recsys_lightning.analysis.grid_tasks import Plan, stages
from recsys_lightning.errors import InputError

# In place of `python -m recsys_lightning`: leaves results, or fails if its folder is called so.
PROGRAM = """
import json, os, pathlib, sys
verb, given = sys.argv[1], dict(word.lstrip("-").split("=", 1) for word in sys.argv[2:])
folder = pathlib.Path(given["run_dir"])
print(verb, os.environ.get("SRUN_CPUS_PER_TASK"), flush=True)
if "bad" in folder.name:
    sys.exit("recsys: error: dim=15 is odd")
if "signalled" in folder.name:
    os.kill(os.getppid(), 15)
folder.mkdir(parents=True, exist_ok=True)
path = folder / "results.json"
known = json.loads(path.read_text()) if path.exists() else {
    **dict.fromkeys(("run", "model", "seed", "data", "hardware", "code", "config"), {}),
    "metrics": {}, "seconds_by_command": {}}
known["metrics"][{"fit": "val/x", "test": "test/x"}[verb]] = 1.0
known["seconds_by_command"][verb] = 1.0
path.write_text(json.dumps(known))
"""


def run(name: str, *needs: str, weights: str | None = None, first: bool = False) -> GridRun:
    folder = Path("runs") / name
    checkpoint = Path("runs") / weights / "checkpoints/best.ckpt" if weights else None
    entry = Entry(name, Path("base.yaml"), {}, {}, weights, first)
    every = (*needs, *([weights] if weights else []))
    return GridRun(name, entry, 7, folder, (f"--run_dir={folder}",), every, checkpoint)


def tasks_of(*runs: GridRun, left: tuple[str, ...] | None = None) -> list[tuple[tuple[str, ...], ...]]:
    named = {one.name: one for one in runs}
    todo = [one for one in runs if left is None or one.name in left]
    return [plan.tasks for plan in stages(todo, named)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text(PROGRAM)
    return tmp_path


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A task takes signals for itself; this process is to have them back."""
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def plan_of(*tasks: tuple[GridRun, ...]) -> Plan:
    return Plan(tuple(tuple(one.name for one in task) for task in tasks), {one.name: one for t in tasks for one in t})


def done(plan: Plan, number: int) -> list[tuple[str, str, str]]:
    events = perform(plan, number, dict(os.environ), (sys.executable, "-S", "program.py"))
    return [(event.run, event.state, event.detail) for event in events if event.state != "started"]


# ---------------------------------------------------------------------------------------------------------- the arrays


def test_runs_that_need_nothing_are_one_array():
    assert tasks_of(run("a"), run("b"), run("c")) == [(("a",), ("b",), ("c",))]
    assert tasks_of() == []


def test_what_others_need_is_an_array_before_theirs_unless_it_is_finished():
    runs = run("ids", first=True), run("a", "ids"), run("b", "ids"), run("c")
    assert tasks_of(*runs) == [(("ids",), ("c",)), (("a",), ("b",))]
    assert tasks_of(*runs, left=("a", "b", "c")) == [(("a",), ("b",), ("c",))]


def test_a_chain_of_needs_is_an_array_for_each_link():
    assert tasks_of(run("c", "b"), run("b", "a"), run("a")) == [(("a",),), (("b",),), (("c",),)]


def test_a_test_of_other_weights_follows_their_training_in_the_same_task():
    runs = run("ids"), run("a", "ids"), run("top", "ids", weights="a"), run("b", "ids")
    assert tasks_of(*runs) == [(("ids",),), (("a", "top"), ("b",))]
    assert tasks_of(*runs, left=("top", "b")) == [(("top",), ("b",))], "that are there already"


def test_it_has_a_task_of_its_own_if_it_needs_what_they_do_not():
    runs = run("a"), run("b"), run("top", "b", weights="a")
    assert tasks_of(*runs) == [(("a",), ("b",)), (("top",),)]


def test_a_plan_is_read_as_it_was_written(folder):
    runs = {one.name: one for one in (run("ids", first=True), run("a", "ids"), run("top", "ids", weights="a"))}
    plan = stages(list(runs.values())[1:], runs)[0]
    plan.write(folder / "plan.json")
    read = Plan.read(folder / "plan.json")
    assert read.tasks == (("a", "top"),)
    assert list(read.runs) == ["a", "ids", "top"], "with what they need"
    assert [one.command("fit") for one in read.runs.values()] == [runs[name].command("fit") for name in read.runs]
    assert [one.left() for one in read.runs.values()] == [["fit", "test"], ["fit"], ["test"]]
    assert read.runs["top"].needs == ("ids", "a")


@pytest.mark.parametrize("text", [None, "{", "{}", '{"tasks": [["a"]], "runs": {"a": {"entry": "a"}}}', "[1]"])
def test_what_is_no_plan_is_refused(folder, text, capsys):
    if text is not None:
        Path("plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan.json is no plan of a job array"):
        Plan.read(Path("plan.json"))
    assert main(["plan.json", "0"]) == 2
    assert capsys.readouterr().err.startswith("recsys: error: plan.json is no plan")


# ----------------------------------------------------------------------------------------------------------- the tasks


def test_a_task_does_its_runs_in_order_and_skips_what_is_finished(folder):
    plan = plan_of((run("a"), run("top", weights="a")), (run("b"),))
    assert done(plan, 0) == [("a", "finished", ""), ("top", "finished", "")]
    assert not Path("runs/b").exists()
    assert done(plan, 0) == [("a", "skipped", ""), ("top", "skipped", "")]
    assert Path("runs/a.log").read_text().splitlines()[0] == "$ recsys fit --run_dir=runs/a --ckpt_path=auto"


def test_a_task_does_nothing_that_needs_what_has_failed(folder):
    plan = plan_of((run("a", "ids"), run("top", "ids", weights="a"), run("b")), (run("ids", first=True),))
    assert done(plan, 0) == [("a", "not run", "needs ids"), ("top", "not run", "needs a"), ("b", "finished", "")]
    done(plan, 1)
    assert done(plan, 0)[0] == ("a", "finished", "")


def test_the_status_of_a_task_tells_of_failures_and_its_output_of_all_events(folder, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    plan_of((run("bad"), run("a", "bad")), (run("b"),)).write(Path("plan.json"))
    program = (sys.executable, "-S", "program.py")
    assert main(["plan.json", "0"], program) == 1
    events, rest = read_events(capsys.readouterr().out)
    assert [(event.run, event.state, event.detail) for event in events] == [
        ("bad", "started", "fit"),
        ("bad", "failed", "dim=15 is odd"),
        ("a", "not run", "needs bad"),
    ]
    assert rest == []
    assert main(["plan.json", "1"], program) == 0
    assert "fit 3\n" in Path("runs/b.log").read_text(), "srun is told the cores of a task"


def test_a_task_outlives_the_signals_at_which_its_runs_save(folder):
    plan_of((run("signalled"),)).write(Path("plan.json"))
    assert main(["plan.json", "0"], (sys.executable, "-S", "program.py")) == 0
    assert json.loads(Path("runs/signalled/results.json").read_text())["metrics"]["test/x"] == 1


def test_events_are_told_from_whatever_else_is_printed():
    lines = ["module loaded", '{"run": "a", "state": "started"}', "[1]", '{"run": 1, "x": 2}', "", "slurmstepd: gone"]
    events, rest = read_events("\n".join(lines))
    assert [(event.run, event.state) for event in events] == [("a", "started")]
    assert rest == ["[1]", '{"run": 1, "x": 2}', "slurmstepd: gone"]
