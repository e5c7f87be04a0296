"""Runs are processes: several at a time, what others need first, and one that fails stops only what needs it."""

import errno
import fcntl
import json
import os
import sys
import time
from pathlib import Path

import pytest

from recsys_lightning.analysis.grid import Entry
from recsys_lightning.analysis.grid_execute import Event, environment_of, execute
from recsys_lightning.analysis.grid_runs import GridRun

# In place of `python -m recsys_lightning`: leaves the results of a command, or does what `--do=` says.
PROGRAM = """
import json, os, pathlib, sys, time
verb, given = sys.argv[1], dict(word.lstrip("-").split("=", 1) for word in sys.argv[2:])
folder, do = pathlib.Path(given["run_dir"]), given.get("do", "")
with open("order.txt", "a") as file:
    file.write(f"{verb} {folder.name}\\n")
print("begin", verb, os.environ.get("OMP_NUM_THREADS"), flush=True)
if do == "fail":
    print("recsys: error: dim=15 is odd\\nand then this line")
    sys.exit(2)
if do == "crash":
    raise ValueError("a bug")
if do == "die":
    os.kill(os.getpid(), 9)
if do == "killed":  # as Slurm says it
    print("slurmstepd-n1: error: Detected 1 oom-kill event(s) in StepId=4.0")
    print("srun: error: n1: task 0: Out Of Memory\\nsrun: launch/slurm: _step_signal: Terminating StepId=4.0")
    sys.exit(137)
if do == "mute":
    sys.exit(3)
if do == "wait":
    time.sleep(60)
if do == "meet":  # until another run is here too
    folder.with_suffix(".here").touch()
    until = time.time() + 20
    while len(list(folder.parent.glob("*.here"))) < 2:
        assert time.time() < until, "alone"
        time.sleep(0.02)
if do != "nothing":
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    known = json.loads(path.read_text()) if path.exists() else {
        **dict.fromkeys(("run", "model", "seed", "data", "hardware", "code", "config"), {}),
        "metrics": {}, "seconds_by_command": {}}
    known["metrics"][{"fit": "val/x", "test": "test/x"}[verb]] = 1.0
    known["seconds_by_command"][verb] = 1.0
    path.write_text(json.dumps(known))
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a run that does as told."""
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text(PROGRAM)

    def run(name: str, do: str = "", needs: tuple[str, ...] = (), first: bool = False) -> GridRun:
        folder = Path("runs") / name
        words = (f"--run_dir={folder}", f"--do={do}")
        return GridRun(name, Entry(name, Path("base.yaml"), {}, {}, first=first), 1, folder, words, needs, None)

    return run


def done(*runs: GridRun, jobs: int = 1) -> list[Event]:
    program = (sys.executable, "-S", "program.py")
    return list(execute(runs, jobs, lambda slot: {**os.environ, "OMP_NUM_THREADS": f"slot {slot}"}, program))


def order() -> list[str]:
    return Path("order.txt").read_text().splitlines()


def ends(events: list[Event]) -> dict[str, str]:
    return {event.run: event.state for event in events}


def test_a_run_is_fitted_then_tested_and_what_it_needs_comes_first(make):
    events = done(make("cobra", needs=("ids",)), make("ids", first=True))
    assert order() == ["fit ids", "fit cobra", "test cobra"]
    assert [(event.run, event.state, event.detail) for event in events] == [
        ("ids", "started", "fit"),
        ("ids", "finished", ""),
        ("cobra", "started", "fit"),
        ("cobra", "started", "test"),
        ("cobra", "finished", ""),
    ]


def test_what_is_finished_is_skipped_and_what_is_half_done_goes_on(make):
    runs = [make("ids", first=True), make("cobra", needs=("ids",))]
    done(*runs)
    Path("order.txt").write_text("")
    results = Path("runs/cobra/results.json")
    results.write_text(results.read_text().replace("test/x", "val/y"))
    assert ends(done(*runs)) == {"ids": "skipped", "cobra": "finished"}
    assert order() == ["test cobra"]
    assert ends(done(*runs)) == {"ids": "skipped", "cobra": "skipped"}


def test_a_failed_run_stops_only_what_needs_it(make):
    runs = [make("a", "fail"), make("b", needs=("a",)), make("c", needs=("b",)), make("d")]
    events = done(*runs)
    assert ends(events) == {"a": "failed", "b": "not run", "c": "not run", "d": "finished"}
    reasons = {event.run: event.detail for event in events}
    assert (reasons["b"], reasons["c"]) == ("needs a", "needs b")
    assert order() == ["fit a", "fit d", "test d"]


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        ("fail", "dim=15 is odd"),
        ("crash", "ValueError: a bug"),
        ("mute", "begin fit slot 0"),
        ("die", "ended by SIGKILL; its last line was 'begin fit slot 0'"),
        ("killed", "slurmstepd-n1: error: Detected 1 oom-kill event(s) in StepId=4.0"),
        ("nothing", "`recsys fit` ended well but left no results in runs/a"),
    ],
)
def test_a_failure_is_told_by_the_last_line_that_names_an_error_or_by_the_last_of_this_command(make, do, reason):
    Path("runs").mkdir()
    Path("runs/a.log").write_text("recsys: error: of yesterday\n")
    failed = done(make("a", do))[-1]
    assert (failed.state, failed.detail) == ("failed", reason)


def test_what_commands_print_is_added_to_the_log_of_the_run(make):
    done(make("a"))
    lines = Path("runs/a.log").read_text().splitlines()
    assert lines == ["$ recsys fit --run_dir=runs/a --do= --ckpt_path=auto", "begin fit slot 0", *lines[2:]]
    assert lines[2:] == ["$ recsys test --run_dir=runs/a --do=", "begin test slot 0"]


def test_as_many_run_at_a_time_as_there_are_jobs(make):
    assert set(ends(done(make("a", "meet"), make("b", "meet"), jobs=2)).values()) == {"finished"}
    logs = [Path(f"runs/{name}.log").read_text() for name in "ab"]
    assert "slot 0" in logs[0]
    assert "slot 1" in logs[1]


def test_one_job_runs_one_at_a_time(make):
    done(make("a"), make("b"))
    assert order() == ["fit a", "test a", "fit b", "test b"]


def test_a_run_that_another_process_is_at_work_on_is_left_to_it(make):
    Path("runs").mkdir()
    with Path("runs/a.log").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        event = done(make("a"), make("b"))[0]
    assert (event.run, event.state) == ("a", "failed")
    assert event.detail == "another process is at work on it and writes runs/a.log"
    assert order() == ["fit b", "test b"]


def test_a_file_system_without_locks_is_no_failure_and_is_said(make, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("recsys_lightning.analysis.grid_execute.fcntl.flock", no_locks)
    assert ends(done(make("a"))) == {"a": "finished"}
    assert Path("runs/a.log").read_text().startswith("runs/a.log cannot be locked here: see to it that no other")


def test_a_process_keeps_its_run_to_itself_when_the_grid_is_gone(make):
    events = execute([make("a", "wait")], 1, lambda _: dict(os.environ), (sys.executable, "-S", "program.py"))
    assert next(events).state == "started"
    frame = events.gi_frame.f_locals["active"][0]
    frame.log.close()  # as if the grid had been killed
    try:
        assert done(make("a"))[0].detail.startswith("another process is at work on it")
    finally:
        frame.process.kill()
        frame.process.wait()
        events.close()


def test_closing_ends_the_processes(make):
    events = execute([make("a", "wait")], 1, lambda _: dict(os.environ), (sys.executable, "-S", "program.py"))
    next(events)
    process = events.gi_frame.f_locals["active"][0].process
    assert process.poll() is None
    started = time.monotonic()
    events.close()
    assert process.poll() is not None
    assert time.monotonic() - started < 9, "it is asked to end before it is killed"


def test_a_damaged_results_file_is_a_failure_of_its_run_alone(make):
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/results.json").write_text("{")
    events = done(make("a"), make("b"))
    assert ends(events) == {"a": "failed", "b": "finished"}
    assert "runs/a/results.json is not JSON" in events[0].detail
    assert json.loads(Path("runs/b/results.json").read_text())["metrics"]["test/x"] == 1


def test_slots_share_out_cores_and_gpus():
    assert environment_of(0, 1, ["0", "1"], {"A": "b"}) == {"A": "b"}
    cores = str(max(1, (os.cpu_count() or 1) // 3))
    assert environment_of(2, 3, ["4", "GPU-5"], {}) == {"OMP_NUM_THREADS": cores, "CUDA_VISIBLE_DEVICES": "4"}
    assert environment_of(1, 3, ["4", "GPU-5"], {"OMP_NUM_THREADS": "7"}) == {
        "OMP_NUM_THREADS": "7",
        "CUDA_VISIBLE_DEVICES": "GPU-5",
    }
    assert "CUDA_VISIBLE_DEVICES" not in environment_of(1, 3, [], {})
