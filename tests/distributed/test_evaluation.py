"""One process and several give one answer: the command, real gloo processes, a number of users that does not divide."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml
from polars.testing import assert_frame_equal

from recsys_lightning.cli import main

USERS = 61  # prime


def experiment(folder: Path) -> dict:
    sizes = {"num_users": USERS, "num_themes": 2, "topics_per_theme": 2, "items_per_topic": 5}
    return {
        "seed_everything": 1,
        "run_dir": str(folder / "one"),
        "data": {
            "class_path": "SequenceDataModule",
            "init_args": {
                "source": {"class_path": "Synthetic", "init_args": sizes},
                "encoder": {"class_path": "TfidfSVD", "init_args": {"dim": 8}},
                "cache_dir": str(folder / "cache"),
                "k_core": 0,
                "batch_size": 16,
                "eval_batch_size": 7,
            },
        },
        "model": {
            "class_path": "RecommenderModule",
            "init_args": {
                "model": {"class_path": "SASRec", "init_args": {"dim": 8}},
                "evaluation": {"ks": [1, 5, 10]},
            },
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained and tested by one process."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment(folder)))
    for command in ("fit", "test"):
        assert main([command, "-c", str(folder / "experiment.yaml")]) == 0
    return folder / "one"


def in_a_clean_shell(command: list[str]) -> None:
    """Run it without variables of another launcher, with one thread a process."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PL_", "SLURM", "LOCAL_"))}
    done = subprocess.run(command, env=clean | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("processes", "launcher", "settings"),
    [
        (2, [], ["--trainer.devices=2", "--trainer.strategy=ddp"]),
        (
            3,
            ["torch.distributed.run", "--standalone", "--nproc_per_node=3", "-m"],
            ["--model.evaluation.index.sharded", "true"],
        ),
    ],
    ids=["2 processes", "3 processes by torchrun, each with a shard of the items"],
)
def test_metrics_and_ranks_are_those_of_one_process(one, processes, launcher, settings):
    several = one.with_name(f"several{processes}")
    shutil.copytree(one, several)
    (several / "ranks-test.parquet").unlink()
    command = [sys.executable, "-m", *launcher, "recsys_lightning", "test", "-c", str(one.parent / "experiment.yaml")]
    command += [f"--run_dir={several}", *settings]
    in_a_clean_shell(command)

    expected, found = (json.loads((run / "results.json").read_text()) for run in (one, several))
    assert found["hardware"]["devices"] == processes
    assert found["metrics"].keys() == expected["metrics"].keys()
    assert found["metrics"]["test/users"] == USERS
    for name, value in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, abs=1e-6), name
    assert_frame_equal(pl.read_parquet(several / "ranks-test.parquet"), pl.read_parquet(one / "ranks-test.parquet"))


def test_recommendations_of_two_processes_are_one_file_and_those_of_one(one):
    several, experiment = one.with_name("predicted"), str(one.parent / "experiment.yaml")
    shutil.copytree(one, several)
    assert main(["predict", "-c", experiment]) == 0
    command = [sys.executable, "-m", "recsys_lightning", "predict", "-c", experiment, f"--run_dir={several}"]
    in_a_clean_shell([*command, "--trainer.devices=2", "--trainer.strategy=ddp"])
    expected, found = (pl.read_parquet(run / "predictions.parquet") for run in (one, several))
    assert found["user_id"].n_unique() == USERS
    assert_frame_equal(found, expected, abs_tol=1e-6)
