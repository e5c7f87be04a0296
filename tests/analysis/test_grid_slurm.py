"""What is left of a grid is submitted once: commands of Slurm that are played here, `tests/slurm` has real ones."""

import json
import os
import sys
from pathlib import Path

import pytest

from recsys_lightning.analysis.grid import Entry
from recsys_lightning.analysis.grid_execute import Event
from recsys_lightning.analysis.grid_runs import GridRun
from recsys_lightning.analysis.grid_slurm import (
    Array,
    SlurmError,
    Task,
    launch,
    queue,
    require_slurm,
    sbatch_words,
    submission,
)
from recsys_lightning.analysis.grid_tasks import Plan
from recsys_lightning.analysis.grid_watch import watch
from recsys_lightning.errors import InputError

# Each call adds its words to calls.json; the n-th answer is that of answers/NAME-n, a file of what it prints. One that
# begins with `error: ` is an error. Without a file, sbatch gives numbers and squeue has nothing.
PROGRAM = f"""#!{sys.executable} -S
import json, pathlib, sys
name, path = pathlib.Path(sys.argv[0]).name, pathlib.Path("calls.json")
calls = json.loads(path.read_text()) if path.exists() else []
calls.append([name, *sys.argv[1:]])
path.write_text(json.dumps(calls))
number = sum(call[0] == name for call in calls)
answer = pathlib.Path(f"{{name}}-{{number}}")
text = answer.read_text() if answer.exists() else str(100 + number) if name == "sbatch" else ""
sys.stdout.write(text)
if "error: " in text:
    print(text, file=sys.stderr)
    sys.exit(1)
"""


def run(name: str, *needs: str, weights: str | None = None) -> GridRun:
    folder = Path("runs") / name
    checkpoint = Path("runs") / weights / "checkpoints/best.ckpt" if weights else None
    every = (*needs, *([weights] if weights else []))
    return GridRun(name, Entry(name, Path("base.yaml"), {}, {}, weights), 7, folder, ("--x=1",), every, checkpoint)


@pytest.fixture(autouse=True)
def cluster(tmp_path, monkeypatch) -> Path:
    """The working directory, in which the commands play Slurm."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "squeue", "scancel"):
        (tmp_path / "bin" / name).write_text(PROGRAM)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def calls(name: str) -> list[list[str]]:
    path = Path("calls.json")
    return [call for call in (json.loads(path.read_text()) if path.exists() else []) if call[0] == name]


def given(call: list[str], option: str) -> str | None:
    return next((word.partition("=")[2] for word in call if word.startswith(f"--{option}=")), None)


def launched(*runs: GridRun, options: tuple[str, ...] = (), jobs: int | None = None):
    return launch(Path("runs"), runs, {one.name: one for one in runs}, options, jobs)


def finish(one: GridRun) -> None:
    one.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, object] = {key: {} for key in ("run", "model", "seed", "data", "hardware", "code", "config")}
    results |= {"metrics": {"test/x": 1.0}, "seconds_by_command": {"fit": 1.0, "test": 1.0}}
    (one.folder / "results.json").write_text(json.dumps(results))


# ---------------------------------------------------------------------------------------------------------- submitting


def test_what_is_left_is_one_array_of_as_many_tasks_at_a_time_as_there_are_jobs():
    done = run("done")
    finish(done)
    found = launched(run("a"), done, run("b"), options=("--partition=gpu",), jobs=3)
    (call,) = calls("sbatch")
    name = given(call, "job-name")
    assert given(call, "array") == "0-1%3"
    assert given(call, "output") == f"runs/.slurm/{name}-%a.out"
    assert given(call, "dependency") is None
    assert "--partition=gpu" in call
    assert Plan.read(Path(f"runs/.slurm/{name}.json")).tasks == (("a",), ("b",))
    program = given(call, "wrap")
    assert program.endswith(f" -m recsys_lightning.analysis.grid_task runs/.slurm/{name}.json $SLURM_ARRAY_TASK_ID")
    assert [(array.name, array.job) for array in found.arrays] == [(name, "101")]


def test_without_a_limit_slurm_decides_how_many():
    launched(run("a"))
    assert given(calls("sbatch")[0], "array") == "0-0"


def test_an_array_waits_for_the_one_that_its_runs_need():
    launched(run("ids"), run("a", "ids"), run("top", "ids", weights="a"))
    first, second = calls("sbatch")
    assert given(second, "dependency") == "afterany:101"
    assert (given(first, "array"), given(second, "array")) == ("0-0", "0-0")


def test_the_users_options_come_after_the_defaults_so_that_they_win():
    words = submission("x", Path("f"), 1, [], ["--signal=USR1@600", "--no-requeue"], None)
    assert words.index("--signal=USR1@600") > words.index("--signal=USR1@120")
    assert words.index("--no-requeue") > words.index("--requeue")


def test_nothing_left_is_nothing_submitted():
    finish(run("a"))
    assert launched(run("a")).arrays == []
    assert calls("sbatch") == []


def test_what_is_queued_is_found_and_only_the_rest_is_submitted():
    name = launched(run("a"), run("b")).arrays[0].name
    Path("squeue-1").write_text(f"{name}|101|0|RUNNING\n{name}|101|1|FAILED\n")
    found = launched(run("a"), run("b"), run("c", "a"))
    assert [array.job for array in found.arrays] == ["101", "102"]
    assert given(calls("squeue")[0], "name") == name
    assert Plan.read(Path(f"runs/.slurm/{found.submitted[0].name}.json")).tasks == (("b",), ("c",))
    assert given(calls("sbatch")[1], "dependency") == "afterany:101_0", "c needs a"


def test_plans_whose_jobs_have_ended_are_dropped():
    name = launched(run("a")).arrays[0].name
    launched(run("a"))
    assert [path.stem for path in Path("runs/.slurm").glob("*.json")] == [given(calls("sbatch")[1], "job-name")]
    assert given(calls("sbatch")[1], "job-name") != name


def test_what_is_queued_with_other_settings_is_refused():
    name = launched(run("a")).arrays[0].name
    Path("squeue-1").write_text(f"{name}|101|0|PENDING\n")
    other = GridRun("a", Entry("a", Path("base.yaml"), {}, {}), 7, Path("runs/a"), ("--x=2",), (), None)
    with pytest.raises(InputError, match=r"runs/a is queued as job 101_0 with other settings .* `scancel 101_0`"):
        launched(other)
    assert len(calls("sbatch")) == 1


def test_what_slurm_refuses_is_one_line_and_leaves_nothing_queued():
    Path("sbatch-2").write_text("sbatch: error: too many jobs\nsbatch: error: Batch job submission failed: limit")
    with pytest.raises(InputError) as refused:
        launched(run("ids"), run("a", "ids"), options=("--partition=gpu x",))
    assert str(refused.value) == (
        "Slurm refuses the jobs (sbatch '--partition=gpu x'): too many jobs; Batch job submission failed: limit; "
        "nothing was submitted"
    )
    assert calls("scancel") == [["scancel", "101"]]
    assert [path.name for path in Path("runs/.slurm").glob("*.json")] == []


def test_a_machine_without_slurm_is_refused(monkeypatch):
    require_slurm()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="there is no sbatch on this machine; run it on a login node"):
        require_slurm()


def test_options_of_sbatch_are_split_as_a_shell_does():
    assert sbatch_words("--partition=gpu --comment 'a b' -t 4") == ["--partition=gpu", "--comment", "a b", "-t", "4"]
    assert sbatch_words("") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--comment 'a", "No closing quotation"),
        ("gpu", "must hold options of sbatch"),
        ("--array=0-3", "--array comes from the runs that are left, and -j; leave it out"),
        ("--dependency afterok:1", "--dependency comes from what the runs need"),
        ("-Jname", "-J comes from the name of the grid"),
        ("--time=1 -o x.log", "-o comes from the folder of the runs"),
    ],
)
def test_options_of_sbatch_that_cannot_be_used_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        sbatch_words(text)


def test_the_queue_is_read_by_names():
    Path("squeue-1").write_text("x|7|0|RUNNING\nx|7|1|PENDING\ny|8|12|FAILED\nz|9|N/A|RUNNING\n")
    assert queue(["x", "y"]) == {
        "x": [Task("7", 0, "RUNNING"), Task("7", 1, "PENDING")],
        "y": [Task("8", 12, "FAILED")],
    }
    assert queue([]) == {}
    Path("squeue-2").write_text("slurm_load_jobs error: Unable to contact slurm controller")
    with pytest.raises(SlurmError, match="Unable to contact"):
        queue(["x"])


# ------------------------------------------------------------------------------------------------------------- waiting


def watched(runs: list[GridRun], tasks: list[tuple[str, ...]], story: list[tuple[list[str], dict[int, str]]]):
    """The events of an array, at each point of a story: the states of its tasks, and what they have printed by then."""
    array = Array("x", "7", Plan(tuple(tasks), {one.name: one for one in runs}), Path())
    points = iter(story)

    def queue(_: object) -> dict[str, list[Task]]:
        states, printed = next(points)
        for number, text in printed.items():
            with array.output(number).open("a") as file:
                file.write(text + "\n")
        if states == ["unreachable"]:
            raise SlurmError("no answer")
        return {"x": [Task("7", number, state) for number, state in enumerate(states) if state]}

    events = [(event.run, event.state, event.detail) for event in watch([array], runs, queue, 0)]
    assert next(points, None) is None, "it has looked until the end of the story"
    return events


def line(run: str, state: str, detail: str = "") -> str:
    return json.dumps(Event(run, state, detail)._asdict())


def test_a_run_is_queued_started_and_finished():
    story = [
        (["PENDING", "RUNNING"], {}),
        (["PENDING", "RUNNING"], {1: line("b", "started", "fit")}),
        (["RUNNING", "COMPLETING"], {0: line("a", "started", "fit"), 1: line("b", "finished")}),
        (["COMPLETED", "COMPLETED"], {0: line("a", "finished")}),
    ]
    assert watched([run("a"), run("b")], [("a",), ("b",)], story) == [
        ("a", "queued", ""),
        ("b", "queued", "with others"),
        ("b", "started", "fit"),
        ("a", "started", "fit"),
        ("b", "finished", ""),
        ("a", "finished", ""),
    ]


def test_a_run_that_is_preempted_has_not_failed_but_goes_on():
    story = [
        (["RUNNING"], {0: line("a", "started", "fit")}),
        (["COMPLETING"], {0: line("a", "failed", "SIGUSR1 after step 3")}),
        (["PENDING"], {}),
        (["unreachable"], {}),
        (["RUNNING"], {0: line("a", "started", "fit")}),
        (["COMPLETED"], {0: line("a", "finished")}),
    ]
    assert watched([run("a")], [("a",)], story) == [
        ("a", "started", "fit"),
        ("a", "queued", "to go on"),
        ("a", "started", "fit"),
        ("a", "finished", ""),
    ]


def test_a_run_whose_task_has_failed_has_failed_with_its_last_error():
    story = [
        (["RUNNING"], {}),
        (["FAILED"], {0: line("a", "failed", "dim=15") + "\n" + line("t", "not run", "needs a")}),
    ]
    assert watched([run("a"), run("t", weights="a")], [("a", "t")], story)[-2:] == [
        ("a", "failed", "dim=15"),
        ("t", "not run", "needs a"),
    ]


@pytest.mark.parametrize(("state", "shown"), [("TIMEOUT", "TIMEOUT"), ("", "Slurm has forgotten how")])
def test_a_task_that_was_killed_is_told_by_its_state_and_last_line(state, shown):
    printed = line("a", "started", "fit") + "\nslurmstepd: error: *** JOB 7 CANCELLED DUE TO TIME LIMIT ***"
    events = watched([run("a"), run("t", weights="a")], [("a", "t")], [(["RUNNING"], {0: printed}), ([state], {})])
    last = "its last line was 'slurmstepd: error: *** JOB 7 CANCELLED DUE TO TIME LIMIT ***'"
    assert events[-2:] == [
        ("a", "failed", f"its job has ended ({shown}); {last}"),
        ("t", "not run", "needs a"),
    ]


def test_a_task_that_printed_nothing_is_judged_by_its_folders():
    finish(run("a"))
    Path("runs/b").mkdir()
    Path("runs/b/results.json").write_text("{")
    events = watched([run("a"), run("b"), run("c")], [("a",), ("b",), ("c",)], [(["COMPLETED"] * 3, {})])
    assert [state for _, state, _ in events] == ["finished", "failed", "failed"]
    assert "runs/b/results.json is not JSON" in events[1][2]
    assert events[2][2] == "its job has ended (COMPLETED)"


def test_what_no_job_does_is_finished_and_what_was_not_asked_for_is_not_told():
    array = Array("x", "7", Plan((("a", "b"),), {"a": run("a"), "b": run("b")}), Path())
    finish(run("a"))
    events = list(watch([array], [run("done"), run("a")], lambda _: {}, 0))
    assert [(event.run, event.state) for event in events] == [("done", "skipped"), ("a", "finished")]


def test_slurm_may_be_away_for_a_while_but_not_for_ever(monkeypatch):
    def away(_: object) -> dict[str, list[Task]]:
        raise SlurmError("no controller")

    array = Array("x", "7", Plan((("a",),), {"a": run("a")}), Path())
    monkeypatch.setattr("recsys_lightning.analysis.grid_watch._PATIENCE", 0.0)
    with pytest.raises(InputError, match="Slurm does not answer: no controller; its jobs may go on"):
        list(watch([array], [run("a")], away, 0))
