"""A tiny experiment, wandb without an account, and a server for it on this machine."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

# The files beside this one are imported by their names.
sys.path.insert(0, str(Path(__file__).parent))

from wandb_server import WandbServer

ROOT = Path(__file__).parents[2]
LOGGER = ROOT / "experiments" / "logger" / "wandb.yaml"
Wandb = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder is about wandb."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.wandb)


@pytest.fixture(autouse=True, scope="module")
def wandb_installed() -> None:
    pytest.importorskip("wandb", reason='needs pip install "recsys_lightning[wandb]"')


def data(folder: Path, kind: str = "SequenceDataModule", **more: Any) -> dict[str, Any]:
    sizes = {"num_users": 60, "num_themes": 2, "topics_per_theme": 2, "items_per_topic": 5}
    init_args = {
        "source": {"class_path": "Synthetic", "init_args": sizes},
        "encoder": {"class_path": "TfidfSVD", "init_args": {"dim": 8}},
        "cache_dir": str(folder / "cache"),
        "k_core": 0,
        "batch_size": 32,
    }
    return {"class_path": kind, "init_args": init_args | more}


def experiment(folder: Path, name: str, **sections: Any) -> Path:
    """A file with a run folder of its name, and the sections given."""
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
    config = {"seed_everything": 1, "run_dir": str(folder / name), "trainer": quiet | sections.pop("trainer")}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config | sections))
    return path


def sasrec(folder: Path) -> Path:
    model = {"class_path": "SASRec", "init_args": {"dim": 8, "num_layers": 1, "num_heads": 1}}
    optimizer = {"class_path": "AdamW", "init_args": {"lr": 0.02}}
    module = {"class_path": "RecommenderModule", "init_args": {"model": model, "optimizer": optimizer}}
    trainer = {"max_epochs": 8, "check_val_every_n_epoch": 2, "log_every_n_steps": 1}
    return experiment(folder, "sasrec", data=data(folder), model=module, trainer=trainer)


def rqvae(folder: Path) -> Path:
    sizes = {"hidden": [8], "latent_dim": 4, "num_levels": 2, "num_codes": 4}
    module = {"tokenizer": {"class_path": "RQVAE", "init_args": sizes}, "optimizer": {"class_path": "AdamW"}}
    module["optimizer"]["init_args"] = {"lr": 0.001}
    monitor = {"monitor": "val/loss", "mode": "min"}
    return experiment(
        folder,
        "rqvae",
        data=data(folder, "ItemDataModule"),
        model={"class_path": "TokenizerModule", "init_args": module},
        trainer={"max_epochs": 1, "log_every_n_steps": 1},
        checkpoint=dict(monitor),
        early_stopping=dict(monitor),
    )


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


@pytest.fixture(scope="module")
def account(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which wandb speaks to `server`, whatever this machine's owner has set for it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return kept | {
        "HOME": str(tmp_path_factory.mktemp("home")),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": "0" * 40,
        "WANDB_ERROR_REPORTING": "false",
    }


@pytest.fixture(scope="module")
def in_account(account: dict[str, str]) -> Iterator[pytest.MonkeyPatch]:
    """This process in that environment."""
    import wandb

    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - account.keys():
            patch.delenv(name)
        for name, value in account.items():
            patch.setenv(name, value)
        patch.setenv("WANDB_SILENT", "true")
        wandb.teardown()  # wandb reads its environment once
        yield patch
        wandb.teardown()


@pytest.fixture(scope="module")
def wandb_command(account: dict[str, str]) -> Wandb:
    """Run wandb's own command line."""

    def run(*words: object, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("wandb")), *map(str, words)]
        return subprocess.run(
            command, env=account, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run
