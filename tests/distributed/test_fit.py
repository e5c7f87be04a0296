"""`recsys fit` and `recsys test` on two gloo processes: the numbers of one process, and one state on both of them.

They are two nodes, as torchrun would say, each with a cache folder of its own.

One process takes batches of 2b and two take b each, so that the batches are the same. What models draw at random, such
as negatives, is made the same too: the first of everything.
"""

import csv
import functools
import json
import os
import socket
import sys
from pathlib import Path
from unittest import mock

import lightning as L
import numpy as np
import polars as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from polars.testing import assert_frame_equal

from recsys_lightning.cli import main

pytestmark = pytest.mark.timeout(900)  # all runs are one fixture's, and cores may be shared

USERS, BATCH = 61, 16  # the last of the batches of two processes is of 13 users
PAIRED = ("RQVAE", "COBRA", "SPARC", "SASRec")  # whose numbers are compared
SIZES = {"num_levels": 2, "num_codes": 4}
RQVAE = {"hidden": [8], "latent_dim": 4, "dead_code_threshold": 0.0} | SIZES
SPARC = {
    "dim": 8,
    "item_encoder": {"class_path": "FeatureItemEncoder", "init_args": {"text": True, "dropout": 0.0}},
    "user": {"dropout": 0.0},
    "codebooks": {"warmup_steps": 2, "dead_code_threshold": 0.0, **SIZES},
    "objective": {"search_weight": 1.0},
    "search": {"num_interests": 2},
}
REPAIR = {"on_collapse": "repair", "min_perplexity_share": 1.0, "gradient_every_n_steps": 0}


def same_draws(losses):
    """A model's losses with draws that do not depend on how many processes share out a batch."""
    draws = {
        "rand": lambda *size, device=None: torch.zeros(size, device=device),
        "randint": lambda high, size, device=None: torch.zeros(size, dtype=torch.long, device=device),
        "multinomial": lambda weights, count, replacement: weights.argmax(1, keepdim=True).expand(-1, count),
    }

    @functools.wraps(losses)
    def wrapped(self, batch):
        with mock.patch.multiple(torch, **draws):
            return losses(self, batch)

    return wrapped


def recommender(name, **settings):
    module = {"model": {"class_path": name, "init_args": settings}, "evaluation": {"ks": [1, 5, 10]}}
    return {"class_path": "RecommenderModule", "init_args": module}


def tokenizer(name, **settings):
    inner = {"tokenizer": {"class_path": name, "init_args": settings}}
    return {"class_path": "TokenizerModule", "init_args": inner}


def experiments(folder: Path) -> dict[str, dict]:
    """The model, and other settings, of every run; those of `PAIRED` first."""
    ids = str(folder / "one" / "RQVAE" / "semantic_ids.safetensors")
    cobra = {
        "semantic_ids": ids,
        "dim": 8,
        "item_encoder": {"class_path": "EmbeddingItemEncoder", "init_args": {"hidden": [8], "dropout": 0.0}},
        "decoder": {"num_layers": 1, "num_heads": 2, "dropout": 0.0},
        "search": {"num_beams": 4},
    }
    models = {
        "RQVAE": tokenizer("RQVAE", **RQVAE),
        "COBRA": recommender("COBRA", **cobra),
        "SPARC": recommender("SPARC", **SPARC),
        "SASRec": recommender("SASRec", dim=8, dropout=0.0),
        # From here on as they are by default: with dropout, dead codes that are set anew, and draws of each process.
        "COBRA as it is": recommender("COBRA", **{**cobra, "decoder": {"num_layers": 1, "num_heads": 2}}),
        "SPARC as it is": recommender("SPARC", dim=8, codebooks={"warmup_steps": 1, "num_codes": 9}),
        "TwoTower": recommender("TwoTower", dim=8),
        "Popularity": recommender("Popularity"),
        "RQVAE by gradient": tokenizer(
            "RQVAE", hidden=[8], codebook_update="gradient", num_codes=9, dead_code_threshold=0.9
        ),
        "RQVAE, repaired": tokenizer("RQVAE", **RQVAE),
        "ResidualVQ": tokenizer("ResidualVQ", **SIZES),
        "ResidualKMeans": tokenizer("ResidualKMeans", **SIZES),
        "BalancedResidualKMeans": tokenizer("BalancedResidualKMeans", **SIZES),
        "ProductQuantizer": tokenizer("ProductQuantizer", opq=True, **SIZES),
        "CategoryTree": tokenizer("CategoryTree", **SIZES),
        "RandomCodes": tokenizer("RandomCodes", **SIZES),
        "PublishedCodes": tokenizer("PublishedCodes", path=str(folder / "codes.parquet"), **SIZES),
    }
    return {name: {"model": model} for name, model in models.items()} | {
        "RQVAE, repaired": {"model": models["RQVAE, repaired"], "codebook_health": REPAIR}
    }


def write(folder: Path, name: str, settings: dict, processes: int, node: int = 0) -> Path:
    sizes = {"num_users": USERS, "num_themes": 3, "topics_per_theme": 1, "items_per_topic": 7}  # 21 items
    learns_codes = settings["model"]["class_path"] == "TokenizerModule"
    data = {
        "source": {"class_path": "Synthetic", "init_args": sizes},
        "encoder": {"class_path": "TfidfSVD", "init_args": {"dim": 8}},
        "template": ["{title}", "{categories}", "{description}"],
        "cache_dir": str(folder / f"cache-{node}"),
        "k_core": 0,
        "batch_size": (6 if learns_codes else BATCH) // processes,
    }
    kind = "ItemDataModule" if learns_codes else "SequenceDataModule"
    epochs = 2 if name in PAIRED else 1
    trainer = {"max_epochs": epochs, "accelerator": "cpu", "log_every_n_steps": 1}
    monitor = {"monitor": "val/loss", "mode": "min"} if learns_codes else {"monitor": "val/ndcg@10", "mode": "max"}
    config = {
        "seed_everything": 1,
        "run_dir": str(folder / {1: "one", 2: "two"}[processes] / name),
        "data": {"class_path": kind, "init_args": data},
        "trainer": trainer | {"enable_progress_bar": False, "enable_model_summary": False},
        "checkpoint": monitor,
        "early_stopping": monitor,
        **settings,
    }
    path = folder / f"{name} {processes} {node}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class StatesNow(L.Callback):
    """Notes where the state of this process is not that of the first when the training ends, or what is unused."""

    def __init__(self, differences: list[str]):
        self.differences = differences

    def on_after_backward(self, trainer, pl_module):
        unused = [name for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is None]
        self.differences += [f"{name} has no gradient" for name in unused]

    def on_train_end(self, trainer, pl_module):
        state = {name: value for name, value in pl_module.state_dict().items() if isinstance(value, torch.Tensor)}
        assert state
        for name, value in state.items():
            first = value.clone()
            dist.broadcast(first, src=0)
            if not torch.equal(first, value):
                self.differences.append(f"{name} differs by {(first - value).abs().max()}")


def process(number: int, port: int, folder: Path) -> None:
    """One of two processes, as torchrun would start it: fits everything, tests what is compared."""
    world = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "GROUP_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    place = {"RANK": number, "LOCAL_RANK": 0, "GROUP_RANK": number, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in {**world, **place}.items()}
    sys.stdout = sys.stderr = (folder / f"output-{number}").open("w", buffering=1)
    torch.set_num_threads(1)
    from recsys_lightning.cli.trainer import RecsysCLI
    from recsys_lightning.models.sparc import SPARC
    from recsys_lightning.nn import codebook, quantize
    from recsys_lightning.semantic_ids import balanced_kmeans, residual_kmeans

    # As if processors rounded differently: each process finds k-means centres of its own.
    def own_centres(rows, num_codes, *args, **settings):
        return codebook.kmeans_codebook(rows, num_codes, *args, **settings) + 1e-3 * number

    for user in (quantize, residual_kmeans, balanced_kmeans):
        user.kmeans_codebook = own_centres
    before_fit = RecsysCLI.before_fit
    found: dict[str, list[str]] = {}

    def watch(self):
        before_fit(self)
        self.trainer.callbacks.append(StatesNow(differences))

    RecsysCLI.before_fit = watch
    for name, settings in experiments(folder).items():
        differences: list[str] = []
        experiment = write(folder, name, settings, processes=2, node=number)
        patched = same_draws(SPARC.losses) if name in PAIRED else SPARC.losses
        with mock.patch.object(SPARC, "losses", patched):
            assert main(["fit", "-c", str(experiment)]) == 0, name
            if name in PAIRED:
                assert main(["test", "-c", str(experiment)]) == 0, name
        found[name] = differences
    (folder / f"states-{number}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of one process in `one` and of two in `two`."""
    from recsys_lightning.models.sparc import SPARC

    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    codes = {f"c{level}": rng.integers(0, 4, 21) for level in range(2)}
    pl.DataFrame({"item_id": [f"i{i:02}" for i in range(21)], **codes}).write_parquet(folder / "codes.parquet")
    with mock.patch.object(SPARC, "losses", same_draws(SPARC.losses)):
        for name in PAIRED:
            experiment = write(folder, name, experiments(folder)[name], processes=1)
            for command in ("fit", "test"):
                assert main([command, "-c", str(experiment), "--trainer.devices=1"]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, args=(port, folder), nprocs=2)
    return folder


def logged(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    # Of the gradients' norms the mean over processes is logged, which is not the norm of their mean.
    return [{key: value for key, value in row.items() if not key.startswith("gradient/")} for row in rows]


@pytest.mark.parametrize("name", PAIRED)
def test_losses_and_metrics_are_those_of_one_process_with_the_same_batches(runs, name):
    one, two = runs / "one" / name, runs / "two" / name
    expected, found = logged(one), logged(two)
    assert len(found) == len(expected)
    steps = 0
    for row, wanted in zip(found, expected, strict=True):
        assert row.keys() == wanted.keys()
        steps += "train/loss" in row
        for key, value in wanted.items():
            assert row[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    assert steps == 8
    assert yaml.safe_load((two / "config.yaml").read_text())["trainer"]["devices"] == "auto", "not the launcher's"
    before, after = (json.loads((run / "results.json").read_text()) for run in (one, two))
    assert (before["hardware"]["devices"], after["hardware"]["devices"]) == (1, 2)
    assert after["metrics"].keys() == before["metrics"].keys()
    for key, value in before["metrics"].items():
        assert after["metrics"][key] == pytest.approx(value, rel=1e-6, abs=1e-6), key
    for stage in ("val", "test"):
        if name != "RQVAE":
            file = f"ranks-{stage}.parquet"
            assert_frame_equal(pl.read_parquet(two / file), pl.read_parquet(one / file))


@pytest.mark.parametrize("name", experiments(Path()))
def test_processes_end_a_training_with_one_state_and_every_parameter_had_a_gradient(runs, name):
    for number in range(2):
        assert json.loads((runs / f"states-{number}.json").read_text())[name] == []


def test_a_repair_of_codebooks_happened_on_two_processes(runs):
    events = (runs / "two" / "RQVAE, repaired" / "codebook-events.jsonl").read_text().splitlines()
    assert [json.loads(event)["action"] for event in events] == ["reset_dead"]
