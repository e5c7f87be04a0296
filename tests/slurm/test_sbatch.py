"""The templates of experiments/cluster on a real Slurm of two nodes: one process of a COBRA on each."""

import json
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def submit(slurm, checkout, tiny_words):
    """Submits a training by a template, on two nodes; returns the job."""

    def run(name: str, slow: float = 0, template: str = "slurm") -> str:
        words = tiny_words(**{"run_dir": f"runs/{name}", "trainer.callbacks": [{"class_path": "slow.Slow"}]})
        options = [
            "--nodes=2",
            f"--chdir={checkout}",
            f"--output={name}.out",
            f"--export=ALL,PYTHONPATH=.,NPROC_PER_NODE=1,SLOW={slow}",
        ]
        return slurm.ask("sbatch", "--parsable", *options, checkout / f"experiments/cluster/{template}.sbatch", *words)

    return run


@pytest.fixture(scope="module")
def jobs(slurm, checkout, submit) -> dict[str, str]:
    """One job that nobody disturbs, and one that is preempted while its processes are at different points."""
    jobs = {"whole": submit("whole"), "preempted": submit("preempted", slow=0.4)}
    slurm.wait_for("a few steps", (checkout / "runs/preempted/step-5-0").exists)
    slurm.ask("scancel", "--signal=USR1", jobs["preempted"])
    slurm.wait_for("queued again", lambda: slurm.state(jobs["preempted"]) == "PENDING")
    slurm.ask("scontrol", "update", f"JobId={jobs['preempted']}", "StartTime=now")  # else it waits for two minutes
    slurm.wait_until_ended(*jobs.values())
    return jobs


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_job_trains_and_tests_on_two_nodes(slurm, checkout, jobs):
    assert slurm.state(jobs["whole"]) == "COMPLETED", (checkout / "whole.out").read_text()
    found = results(checkout / "runs/whole")
    assert found["hardware"]["devices"] == 2
    assert set(found["seconds_by_command"]) == {"fit", "test"}
    assert (checkout / "runs/whole/step-1-1").exists(), "the second process trains too"


def test_a_preempted_job_is_queued_again_and_ends_as_one_that_nobody_has_disturbed(slurm, checkout, jobs):
    output = (checkout / "preempted.out").read_text()
    assert slurm.state(jobs["preempted"]) == "COMPLETED", output
    assert "Restarts=1" in slurm.ask("scontrol", "show", "job", jobs["preempted"])
    whole, preempted = (
        torch.load(checkout / f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for name in jobs
    )
    assert {key: torch.equal(whole[key], value) for key, value in preempted.items()} == dict.fromkeys(whole, True)
    one, other = (results(checkout / "runs" / name)["metrics"] for name in jobs)
    assert one == other


def test_torchrun_under_srun_is_cancelled_saves_and_ends_the_same_when_it_is_submitted_again(
    slurm, checkout, jobs, submit
):
    job = submit("elastic", slow=0.4, template="torchrun")
    slurm.wait_for("a few steps", (checkout / "runs/elastic/step-5-0").exists)
    slurm.ask("scancel", job)
    slurm.wait_until_ended(job)
    assert slurm.state(job) == "CANCELLED"
    assert (checkout / "runs/elastic/checkpoints/resume.ckpt").exists(), (checkout / "elastic.out").read_text()
    job = submit("elastic", template="torchrun")
    slurm.wait_until_ended(job)
    output = (checkout / "elastic.out").read_text()
    assert slurm.state(job) == "COMPLETED", output
    assert "going on from runs/elastic/checkpoints/resume.ckpt" in output
    found = results(checkout / "runs/elastic")
    assert found["hardware"]["devices"] == 2
    assert found["metrics"] == results(checkout / "runs/whole")["metrics"]
