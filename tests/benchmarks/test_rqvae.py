"""The benchmark of RQ-VAE runs and writes what it measured; the figures themselves are no test."""

import importlib.util
import runpy
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml

pytest.importorskip("matplotlib")
SCRIPT = Path(__file__).with_name("rqvae.py")


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A command line of toy sizes; one epoch on a synthetic catalogue."""
    source = {"class_path": "Synthetic", "init_args": {"num_users": 30}}
    encoder = {"class_path": "TfidfSVD", "init_args": {"dim": 8}}
    data = {"source": source, "encoder": encoder, "cache_dir": str(tmp_path / "cache"), "k_core": 0}
    sizes = {"hidden": [8], "latent_dim": 4, "num_levels": 3, "num_codes": 4}
    config = {
        "data": {"class_path": "ItemDataModule", "init_args": data},
        "model": {
            "class_path": "TokenizerModule",
            "init_args": {"tokenizer": {"class_path": "RQVAE", "init_args": sizes}},
        },
        "trainer": {"max_epochs": 1},
        "checkpoint": {"monitor": "val/loss", "mode": "min"},
        "early_stopping": {"monitor": "val/loss", "mode": "min"},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    chosen = {
        "experiments": tmp_path / "toy.yaml",
        "runs": tmp_path / "runs",
        "output": tmp_path / "rqvae.md",
        "steps": 2,
        "batch": 16,
        "speed_batch": 8,
        "speed_codes": 4,
        "dim": 6,
        "hidden": 8,
        "latent": 4,
        "repeats": 1,
    }
    return [
        str(SCRIPT),
        "--seeds",
        "1",
        "2",
        *(word for name, value in chosen.items() for word in (f"--{name}", str(value))),
    ]


def rows(written: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in written.splitlines() if line.startswith("| ")]


def test_the_benchmark_writes_its_tables_and_does_not_repeat_a_finished_run(tmp_path, monkeypatch, capsys, words):
    pytest.importorskip("vector_quantize_pytorch")
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    written = (tmp_path / "rqvae.md").read_text()
    assert [row[:2] for row in rows(written) if row[0] == "toy"] == [["toy", "1"], ["toy", "2"]]
    compared = [row for row in rows(written) if row[0] == "3x4"]
    assert len(compared) == 2
    assert float(compared[0][2]) == pytest.approx(float(compared[0][3]), rel=0.05)  # the same codebooks to start from
    assert {row[0] for row in rows(written)} >= {"ours", "ours, Gumbel", "ours, Sinkhorn last level", "ResidualVQ"}
    assert str(tmp_path) not in written
    assert (tmp_path / "rqvae.png").stat().st_size > 0
    table = pl.read_csv(tmp_path / "rqvae.csv")
    assert table["seed"].to_list() == [1, 2]
    made = (tmp_path / "runs" / "toy-seed1" / "results.json").stat().st_mtime_ns
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert (tmp_path / "runs" / "toy-seed1" / "results.json").stat().st_mtime_ns == made


def test_without_the_other_library_it_says_what_is_left_out(tmp_path, monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", words)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "vector_quantize_pytorch" else find(name)
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "vector-quantize-pytorch is not installed" in (tmp_path / "rqvae.md").read_text()
