"""Whatever happens to a process under torchrun, the training is restarted, does not hang, and ends undisturbed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recsys_lightning.cli import main
from runs import assert_same, experiments

WORKER = Path(__file__).with_name("worker.py")


def torchrun(folder: Path, target: Path, disturb: str = "-1 0 SIGTERM self") -> int:
    """COBRA on two processes; `disturb` is a rank, a step, a signal, and whether it or the agent gets it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    command += [WORKER, "fit", "-c", folder / "cobra.yaml", f"--run_dir={target}", "--ckpt_path=auto"]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp", "--preemption.every_n_steps=2"]
    # As on a clean shell; without the last variable, restarted processes may read what the first ones have agreed on.
    known = {key: value for key, value in os.environ.items() if not key.startswith(("PL_", "SLURM", "LOCAL_"))}
    known |= {"OMP_NUM_THREADS": "1", "DISTURB": disturb, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with target.with_suffix(".log").open("ab") as log:
        return subprocess.run(command, env=known, stdout=log, stderr=log, timeout=240, check=False).returncode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an undisturbed run of COBRA on two processes."""
    folder = tmp_path_factory.mktemp("torchrun")
    found = experiments(folder)
    found["cobra"]["data"]["init_args"]["batch_size"] = 8  # a process: as many steps as one process has with 15
    for name in ("rqvae", "cobra"):
        config = {"seed_everything": 7, "run_dir": str(folder / name)} | found[name]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "-c", str(folder / "rqvae.yaml")]) == 0
    assert torchrun(folder, folder / "cobra") == 0, (folder / "cobra.log").read_text()
    return folder


# What happens, and torchrun's exit status. The agent, once it is gone, has to be started by whoever started it.
CASES = {
    "a killed worker": ("{rank} {step} SIGKILL self", 0),
    "a worker told to stop": ("{rank} {step} SIGTERM self", 0),
    "the agent told to stop": ("{rank} {step} SIGTERM agent", 1),
}


def check(folder: Path, case: str, step: int, rank: int) -> None:
    disturb, expected = CASES[case]
    target = folder / f"{case.replace(' ', '-')}-{step}"
    status = torchrun(folder, target, disturb.format(step=step, rank=rank))
    assert status == expected, target.with_suffix(".log").read_text()
    if status:  # the agent is gone and its workers with it: whoever started it starts it again
        assert torchrun(folder, target) == 0, target.with_suffix(".log").read_text()
    assert "going on from" in target.with_suffix(".log").read_text()
    assert_same(target, folder / "cobra")


@pytest.mark.parametrize(("case", "step", "rank"), [("a killed worker", 5, 1), ("a worker told to stop", 6, 0)])
def test_it_ends_as_if_undisturbed(folder, case, step, rank):
    check(folder, case, step, rank)


# Within epochs and at their ends, of both workers.
@pytest.mark.slow
@pytest.mark.parametrize(("step", "rank"), [(3, 0), (5, 1), (8, 0), (9, 1), (11, 0)])
@pytest.mark.parametrize("case", CASES)
def test_it_ends_as_if_undisturbed_five_times_of_five(folder, case, step, rank):
    check(folder, case, step, rank)
