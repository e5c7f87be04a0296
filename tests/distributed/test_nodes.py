"""Two agents of torchrun as two nodes of one machine, each with a cache folder of its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow  # ten processes that import torch


def experiment(folder: Path, model: Path) -> Path:
    sizes = {"num_users": 40, "num_themes": 2, "topics_per_theme": 2, "items_per_topic": 5}
    encoder = {"class_path": "SentenceTransformerEncoder", "init_args": {"model": str(model), "batch_size": 2}}
    data = {
        "source": {"class_path": "Synthetic", "init_args": sizes},
        "encoder": encoder,
        "cache_dir": "${oc.env:NODE_CACHE}",
        "k_core": 0,
        "batch_size": 4,
    }
    tokenizer = {"class_path": "RQVAE", "init_args": {"hidden": [8], "latent_dim": 4, "num_levels": 2, "num_codes": 4}}
    monitor = {"monitor": "val/loss", "mode": "min"}
    config = {
        "seed_everything": 1,
        "run_dir": str(folder / "run"),
        "data": {"class_path": "ItemDataModule", "init_args": data},
        "model": {"class_path": "TokenizerModule", "init_args": {"tokenizer": tokenizer}},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False},
        "checkpoint": monitor,
        "early_stopping": monitor,
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def on_two_nodes(folder: Path, *arguments: str) -> list[str]:
    """Run a command on both; what each has written."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "-m", "recsys_lightning", *arguments]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PL_", "SLURM", "LOCAL_"))}
    clean |= {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "CUDA_VISIBLE_DEVICES": ""}
    both = [
        subprocess.Popen(
            [*command[:4], "--local_addr=127.0.0.1", *command[4:]],
            env=clean | {"NODE_CACHE": str(folder / f"cache-{node}")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return said


def test_two_nodes_prepare_share_out_the_texts_and_train_one_model(tmp_path, tiny_t5):
    path = experiment(tmp_path, tiny_t5)
    said = on_two_nodes(tmp_path, "prepare", "-c", str(path))
    assert sum(text.count("│ text encoder") for text in said) == 1, "one process prints"
    caches = [{file.name: file.read_bytes() for file in (tmp_path / f"cache-{node}").glob("text-*")} for node in (0, 1)]
    assert len(caches[0]) == 2
    assert caches[0] == caches[1]
    on_two_nodes(tmp_path, "fit", "-c", str(path))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["hardware"]["devices"] == 4
    assert results["epochs"] == 2
    assert (tmp_path / "run" / "semantic_ids.safetensors").is_file()
