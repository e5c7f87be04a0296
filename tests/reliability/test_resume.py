"""A training that is stopped or killed at any step, and goes on, is the training that was not."""

import json
import signal
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from processes import run

from recsys_lightning.cli import main

STEPS = 12  # four batches an epoch


def experiments(folder: Path) -> dict[str, dict]:
    """A tokenizer, COBRA and SPARC with everything that draws: dropout, negatives, shuffles, k-means, new codewords."""
    sizes = {"num_users": 60, "num_themes": 2, "topics_per_theme": 2, "items_per_topic": 15}
    trainer = {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    trainer |= {"enable_model_summary": False, "log_every_n_steps": 1}

    def data(kind: str, **settings: object) -> dict:
        source = {"class_path": "Synthetic", "init_args": sizes}
        encoder = {"class_path": "TfidfSVD", "init_args": {"dim": 8}}
        common = {"source": source, "encoder": encoder, "cache_dir": str(folder / "cache"), "k_core": 0}
        return {"class_path": kind, "init_args": common | {"batch_size": 15} | settings}

    def recommender(name: str, **settings: object) -> dict:
        model = {"class_path": name, "init_args": settings}
        return {"class_path": "RecommenderModule", "init_args": {"model": model}}

    rqvae = {"hidden": [8], "latent_dim": 4, "num_levels": 2, "num_codes": 4}
    tokenizer = {"class_path": "RQVAE", "init_args": rqvae}
    loss = {"monitor": "val/loss", "mode": "min"}
    return {
        "rqvae": {
            "data": data("ItemDataModule"),
            "model": {"class_path": "TokenizerModule", "init_args": {"tokenizer": tokenizer}},
            "trainer": trainer,
            "checkpoint": loss,
            "early_stopping": loss,
        },
        "cobra": {
            "data": data("SequenceDataModule"),
            "model": recommender(
                "COBRA",
                semantic_ids=str(folder / "rqvae" / "semantic_ids.safetensors"),
                dim=16,
                item_encoder={"class_path": "EmbeddingItemEncoder", "init_args": {"hidden": [16], "dropout": 0.2}},
                decoder={"num_layers": 1, "num_heads": 2, "dropout": 0.2},
                objective={"negatives": "batch", "extra_negatives": 8, "queue": 16},
                search={"num_beams": 4},
            ),
            "trainer": trainer,
        },
        "sparc": {
            "data": data("SequenceDataModule"),
            "model": recommender(
                "SPARC",
                dim=16,
                user={"num_layers": 1, "num_heads": 2, "dropout": 0.2},
                codebooks={"num_levels": 2, "num_codes": 8, "warmup_steps": 3, "dead_code_threshold": 0.5},
                objective={"negatives": 2},
            ),
            "trainer": trainer,
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an undisturbed run of each experiment."""
    folder = tmp_path_factory.mktemp("resume")
    for name, config in experiments(folder).items():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"seed_everything": 7, "run_dir": str(folder / name)} | config))
        assert main(["fit", "-c", str(path)]) == 0
    return folder


def disturbed(folder: Path, name: str, signals: list[tuple[int, int]], *settings: str) -> tuple[Path, list[int]]:
    """A run that gets a signal at each of some steps, and is started again each time by the same command."""
    place = "-".join(f"{number}.{step}" for step, number in signals)
    target = folder / f"{name}-{place}-{len(settings)}"
    words = ["fit", "-c", folder / f"{name}.yaml", f"--run_dir={target}", "--ckpt_path=auto", *settings]
    statuses = [run(words, target.with_suffix(".log"), {step: number}) for step, number in signals]
    return target, [*statuses, run(words, target.with_suffix(".log"))]


def assert_same(found: Path, expected: Path) -> None:
    weights = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (found, expected)]
    assert weights[0]["global_step"] == weights[1]["global_step"] == STEPS
    for name, tensor in weights[1]["state_dict"].items():
        assert torch.equal(weights[0]["state_dict"][name], tensor), name
    results = [json.loads((run / "results.json").read_text()) for run in (found, expected)]
    for part in ("metrics", "steps", "epochs", "evidence"):
        assert results[0][part] == results[1][part], part
    tables = [pl.read_csv(run / "metrics.csv").filter(pl.col("train/loss").is_not_null()) for run in (found, expected)]
    for table in tables:
        assert table["step"].to_list() == list(range(STEPS)), "every step once, none lost and none repeated"
    assert tables[0]["train/loss"].to_list() == tables[1]["train/loss"].to_list()
    codes = [run / "codebook-usage.parquet" for run in (found, expected)]
    assert [path.is_file() for path in codes] in ([True, True], [False, False])
    if codes[0].is_file():
        assert pl.read_parquet(codes[0]).equals(pl.read_parquet(codes[1]))
    assert not (found / "checkpoints" / "resume.ckpt").exists(), "a finished training has nothing to go on from"


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
