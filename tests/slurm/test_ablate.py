"""`recsys ablate --launcher slurm` on a real Slurm of two nodes."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recsys_lightning.cli import main

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
COMMAND = ("ablate", "tiny.yaml", "--launcher", "slurm", "-j", "2")
RUNS = Path("runs/ablations/tiny")


@pytest.fixture
def folder(checkout, tiny_words, monkeypatch) -> Path:
    """The working directory: a grid of a tokenizer, two trainings and another test of the first."""
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("PYTHONPATH", ".")
    monkeypatch.syspath_prepend(str(checkout))
    monkeypatch.setenv("SLOW", "0.4")
    monkeypatch.setattr("recsys_lightning.cli.ablate._SLURM_PAUSE", 0.3)

    def settings(*arguments: object) -> dict[str, object]:
        """Of the command line, as a grid has them."""
        return {key[2:]: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in arguments[2:])}

    ids = {"model.model.semantic_ids": "{ids}/semantic_ids.safetensors"}
    grid = {
        "title": "Tiny",
        "base": "experiments/demo/cobra.yaml",
        "seeds": [7],
        "set": settings(*tiny_words()) | ids | {"trainer.callbacks": [{"class_path": "slow.Slow"}]},
        "first": {"ids": {"base": "experiments/demo/rqvae.yaml", "set": settings(*tiny_words("rqvae"))}},
        "variants": {
            "whole": {},
            "odd": {"set": {"model.model.dim": 15}},  # which COBRA refuses once it is built
            "top-1": {"weights": "whole", "set": {"model.model.search.num_beams": 1}},
        },
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return checkout


def test_a_grid_as_job_arrays_is_left_preempted_come_back_to_and_run_once(slurm, folder, capfd):
    # The command waits, and is left.
    command = [sys.executable, "-m", "recsys_lightning", *COMMAND]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **streams) as waiting:
        slurm.wait_for("a few steps", (RUNS / "whole-seed7/step-3-0").exists)
        waiting.send_signal(signal.SIGINT)
        said, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 130, said
    first, second = re.findall(r"^submitted job (\d+), (\d) tasks", said, re.MULTILINE)
    assert (first[1], second[1]) == ("1", "2"), "the tokenizer, then an array of all variants"
    end = f"The jobs go on; the same command waits for them again. To end them: scancel {first[0]} {second[0]}\n"
    assert end in said

    # A run is preempted, and queued again.
    task = f"{second[0]}_0"
    slurm.ask("scancel", "--signal=USR1", task)
    slurm.wait_for("queued again", lambda: slurm.state(task) == "PENDING")
    slurm.ask("scontrol", "update", f"JobId={task}", "StartTime=now")  # else it waits for two minutes

    # The same command waits for what is left.
    capfd.readouterr()
    assert main(list(COMMAND)) == 1, "one run has failed"
    said = capfd.readouterr().out
    assert f"found, submitted before: job {second[0]}, 2 tasks" in said
    assert "tiny: 4 runs: 2 finished, 1 finished before, 1 failed\n" in said
    failed = next(line for line in said.splitlines() if line.startswith("failed: "))
    assert re.fullmatch(r"failed: odd-seed7: .*\b15\b.* \(runs/ablations/tiny/odd-seed7.log\)", failed)
    assert "Not in this table: odd-seed7, failed: " in said
    fits = {name: (RUNS / f"{name}.log").read_text().count("$ recsys fit") for name in ("ids", "whole-seed7")}
    assert fits == {"ids": 1, "whole-seed7": 2}
    assert (
        "going on from runs/ablations/tiny/whole-seed7/checkpoints/resume.ckpt"
        in (RUNS / "whole-seed7.log").read_text()
    )

    # What is finished is submitted no more.
    text = Path("tiny.yaml").read_text()
    Path("tiny.yaml").write_text(text.replace("  odd:\n    set:\n      model.model.dim: 15\n", ""))
    jobs = slurm.ask("squeue", "--noheader", "--states=all", "--format=%F")
    assert main(list(COMMAND)) == 0
    assert "tiny: 3 runs: 3 finished before\n" in capfd.readouterr().out
    assert slurm.ask("squeue", "--noheader", "--states=all", "--format=%F") == jobs


def test_a_partition_that_does_not_exist_is_one_line_and_nothing_is_left(slurm, folder, capfd):
    before = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    assert main([*COMMAND, "--runs", "runs/other", "--sbatch", "--partition=nope"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        "recsys: error: Slurm refuses the jobs (sbatch --partition=nope): invalid partition specified: nope; "
        "Batch job submission failed: Invalid partition name specified; nothing was submitted"
    )
    assert sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock") == before
    assert [path.name for path in (folder / "runs/other/.slurm").iterdir()] == ["lock"]
