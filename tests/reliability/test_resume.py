"""A training that is stopped or killed at any step, and goes on, is the training that was not."""

import signal
from pathlib import Path

import pytest
import torch
import yaml
from processes import run

from runs import STEPS, assert_same, experiments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an undisturbed run of each experiment."""
    folder = tmp_path_factory.mktemp("resume")
    for name, config in experiments(folder).items():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"seed_everything": 7, "run_dir": str(folder / name)} | config))
        assert run(["fit", "-c", path], path.with_suffix(".log")) == 0
    return folder


def disturbed(folder: Path, name: str, signals: list[tuple[int, int]], *settings: str) -> tuple[Path, list[int]]:
    """A run that gets a signal at each of some steps, and is started again each time by the same command."""
    place = "-".join(f"{number}.{step}" for step, number in signals)
    target = folder / f"{name}-{place}-{len(settings)}"
    words = ["fit", "-c", folder / f"{name}.yaml", f"--run_dir={target}", "--ckpt_path=auto", *settings]
    statuses = [run(words, target.with_suffix(".log"), {step: number}) for step, number in signals]
    return target, [*statuses, run(words, target.with_suffix(".log"))]


@pytest.mark.parametrize("name", ["rqvae", "cobra", "sparc"])
def test_stopped_in_the_middle_and_at_the_end_of_an_epoch(folder, name):
    target, statuses = disturbed(folder, name, [(2, signal.SIGTERM), (4, signal.SIGUSR1), (7, signal.SIGINT)])
    assert statuses == [143, 138, 130, 0]
    assert_same(target, folder / name)


@pytest.mark.parametrize("name", ["cobra", "sparc"])
def test_killed_without_a_word_it_goes_on_from_what_was_saved_every_few_steps(folder, name):
    # Step 6 is saved, 7 is lost and done again; 8 is the end of an epoch.
    kills = [(7, signal.SIGKILL), (8, signal.SIGKILL)]
    target, statuses = disturbed(folder, name, kills, "--preemption.every_n_steps=2")
    assert statuses == [-9, -9, 0]
    assert_same(target, folder / name)


def test_killed_before_anything_was_saved_it_begins_anew(folder):
    target, statuses = disturbed(folder, "cobra", [(2, signal.SIGKILL)])
    assert statuses == [-9, 0]
    assert_same(target, folder / "cobra")


def test_with_worker_processes_and_accumulated_gradients(folder):
    settings = ["--data.num_workers=1", "--trainer.accumulate_grad_batches=2"]
    plain = folder / "accumulated"
    words = ["fit", "-c", folder / "cobra.yaml", *settings, f"--run_dir={plain}"]
    assert run(words, plain.with_suffix(".log")) == 0
    # A signal between two batches that belong to one step is obeyed after the second.
    target, statuses = disturbed(folder, "cobra", [(3, signal.SIGTERM), (6, signal.SIGTERM)], *settings)
    assert statuses == [143, 143, 0]
    weights = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (target, plain)]
    assert weights[0]["global_step"] == weights[1]["global_step"] == STEPS // 2
    for name, tensor in weights[1]["state_dict"].items():
        assert torch.equal(weights[0]["state_dict"][name], tensor), name


def test_by_minutes_it_is_saved_too(folder):
    target, statuses = disturbed(folder, "cobra", [(3, signal.SIGKILL)], "--preemption.every_minutes=0.00001")
    assert statuses == [-9, 0]
    assert "going on from" in target.with_suffix(".log").read_text()
    assert_same(target, folder / "cobra")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rqvae", "cobra", "sparc"])
@pytest.mark.parametrize("step", range(1, STEPS))
def test_stopped_and_killed_at_every_step(folder, name, step):
    signals = [(step, signal.SIGTERM)]
    target, statuses = disturbed(folder, name, signals, "--data.num_workers=2")
    assert statuses == [143, 0]
    assert_same(target, folder / name)
    target, statuses = disturbed(folder, name, [(step, signal.SIGKILL)], "--preemption.every_n_steps=1")
    assert statuses == [-9, 0]
    assert_same(target, folder / name)
