"""Small trainings in which everything is drawn that can be, and what makes two of them the same."""

import json
from pathlib import Path

import polars as pl
import torch

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
