"""Tiny experiments on the synthetic catalogue, run in this process through `recsys_lightning.cli.main`."""

import copy
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from recsys_lightning.cli import main

WriteYaml = Callable[..., Path]
Recsys = Callable[..., "Outcome"]

QUIET = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}


def data(class_path: str, folder: Path, **settings: Any) -> dict[str, Any]:
    sizes = {"num_users": 60, "num_themes": 2, "topics_per_theme": 2, "items_per_topic": 5}
    init_args = {
        "source": {"class_path": "Synthetic", "init_args": sizes},
        "encoder": {"class_path": "TfidfSVD", "init_args": {"dim": 8}},
        "template": ["{title}", "{categories}", "{description}"],
        "cache_dir": str(folder / "cache"),
        "k_core": 0,
        "batch_size": 16,
    }
    return {"class_path": class_path, "init_args": init_args | settings}


def tokenizer_config(folder: Path) -> dict[str, Any]:
    sizes = {"hidden": [8], "latent_dim": 4, "num_levels": 2, "num_codes": 4}
    return {
        "seed_everything": 1,
        "run_dir": str(folder / "rqvae"),
        "data": data("ItemDataModule", folder),
        "model": {
            "class_path": "TokenizerModule",
            "init_args": {"tokenizer": {"class_path": "RQVAE", "init_args": sizes}},
        },
        "trainer": dict(QUIET),
        "checkpoint": {"monitor": "val/loss", "mode": "min"},
        "early_stopping": {"monitor": "val/loss", "mode": "min"},
    }


def cobra_config(folder: Path) -> dict[str, Any]:
    settings = {
        "semantic_ids": str(folder / "rqvae" / "semantic_ids.safetensors"),
        "dim": 16,
        "item_encoder": {"class_path": "EmbeddingItemEncoder", "init_args": {"hidden": [16]}},
        "decoder": {"num_layers": 1, "num_heads": 2},
        "search": {"num_beams": 4},
    }
    return {
        "seed_everything": 1,
        "run_dir": str(folder / "cobra"),
        "data": data("SequenceDataModule", folder, max_history=20),
        "model": {
            "class_path": "RecommenderModule",
            "init_args": {
                "model": {"class_path": "COBRA", "init_args": settings},
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.001}},
            },
        },
        "trainer": dict(QUIET),
    }


def edited(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with one dotted key set, or removed where the value is None."""
    result = copy.deepcopy(config)
    node = result
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return result


class Outcome:
    """What a command answered."""

    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err

    @property
    def error(self) -> str:
        """The one line of a command that refused its input."""
        lines = [line for line in self.err.splitlines() if line.startswith("recsys: error: ")]
        assert self.status == 2, (self.status, self.err)
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0], "nothing follows the message"
        assert "Traceback" not in self.err
        assert "usage:" not in self.err
        return lines[0].removeprefix("recsys: error: ")


@pytest.fixture
def recsys(capsys: pytest.CaptureFixture[str]) -> Recsys:
    """Run a command in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


def write(path: Path, config: dict[str, Any] | str) -> Path:
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.fixture
def write_yaml(tmp_path: Path) -> WriteYaml:
    """Write a small configuration file."""

    def save(config: dict[str, Any] | str, name: str = "experiment.yaml") -> Path:
        return write(tmp_path / name, config)

    return save


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a tokenizer and COBRA have been trained for an epoch, with their two files."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = write(folder / "rqvae.yaml", tokenizer_config(folder))
    cobra = write(folder / "cobra.yaml", cobra_config(folder))
    assert main(["fit", "-c", str(tokenizer)]) == 0
    assert main(["fit", "-c", str(cobra)]) == 0
    return folder


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """A copy of the trained runs, for this test to change; the cache is shared."""
    folder = tmp_path / "trained"
    folder.mkdir()
    for run in ("rqvae", "cobra"):
        shutil.copytree(trained_once / run, folder / run)
        name = f"{run}.yaml"
        text = (trained_once / name).read_text().replace(str(trained_once / run), str(folder / run))
        (folder / name).write_text(text.replace(str(trained_once / "rqvae"), str(folder / "rqvae")))
        saved = folder / run / "config.yaml"
        saved.write_text(saved.read_text().replace(str(trained_once / run), str(folder / run)))
        saved.write_text(saved.read_text().replace(str(trained_once / "rqvae"), str(folder / "rqvae")))
    return folder


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning stops listening to Ctrl+C once it came: listen again afterwards."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def tokenizer(tmp_path: Path) -> dict[str, Any]:
    """The configuration of a tiny RQ-VAE."""
    return tokenizer_config(tmp_path)


@pytest.fixture
def cobra(tmp_path: Path) -> dict[str, Any]:
    """The configuration of a tiny COBRA."""
    return cobra_config(tmp_path)


@pytest.fixture
def edit() -> Callable[[dict[str, Any], str, Any], dict[str, Any]]:
    """See `edited`."""
    return edited
