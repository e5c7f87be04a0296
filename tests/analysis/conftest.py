"""Run folders with ranks files that a person can picture."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys_lightning.data.interactions import Interactions


def table_of(first: list[int], unseen: list[int] | None = None, users: list[str] | None = None) -> pl.DataFrame:
    """One answer a user, without ties."""
    unseen = first if unseen is None else unseen
    names = [f"user {at:04}" for at in range(len(first))] if users is None else users
    columns = {"first": first, "first_unseen": unseen}
    columns |= {"tied": [int(rank > 0) for rank in first], "tied_unseen": [int(rank > 0) for rank in unseen]}
    ids = {"user_id": names, "item_id": [f"item {name[-1]}" for name in names]}
    return pl.DataFrame({**ids, **columns}).with_columns(pl.col(list(columns)).cast(pl.Int32))


@pytest.fixture
def ranks_table() -> Callable[..., pl.DataFrame]:
    """See `table_of`."""
    return table_of


def drawn_ranks(rng: np.random.Generator, hit_rate: float) -> list[int]:
    return [int(rng.integers(1, 11)) if rng.random() < hit_rate else 0 for _ in range(400)]


def run_of(folder: Path, first: list[int], unseen: list[int], seed: int, users: list[str] | None = None) -> Path:
    """A run folder whose metrics are worked out by hand from its ranks."""
    folder.mkdir(parents=True)
    metrics = {"test/tail/recall@10": 0.01 * seed, "test/users": float(len(first))}
    for split, ranks in (("test", first), ("test-unseen", unseen)):
        metrics[f"{split}/recall@5"] = sum(0 < rank <= 5 for rank in ranks) / len(ranks)
        metrics[f"{split}/ndcg@10"] = sum(1 / math.log2(rank + 1) for rank in ranks if 0 < rank <= 10) / len(ranks)
    results = {
        "run": "elsewhere",
        "model": folder.parent.name.upper(),
        "seed": seed,
        "metrics": metrics,
        "data": {"source": "made up", "fingerprint": "0" * 64, "text_encoder": None},
        "hardware": {"devices": 1, "gpu": None, "cpu": "x86_64", "cpu_cores": 2, "torch": "2.13.0"},
        "seconds_by_command": {"fit": 1.0},
        "code": {"version": "0.2.0", "sha256": "1" * 64, "commit": None},
        "config": {"seed_everything": seed, "run_dir": str(folder), "model": {"class_path": folder.parent.name}},
    }
    (folder / "results.json").write_text(json.dumps(results))
    table_of(first, unseen, users).write_parquet(folder / "ranks-test.parquet")
    return folder


@pytest.fixture
def write_run() -> Callable[..., Path]:
    """See `run_of`."""
    return run_of


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Two seeds of a good model and one of a bad one, 400 users; their ranks over all items by folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    first = {
        "runs/good/seed1": drawn_ranks(rng, 0.5),
        "runs/good/seed2": drawn_ranks(rng, 0.5),
        "runs/bad/seed1": drawn_ranks(rng, 0.1),
    }
    for name, ranks in first.items():
        run_of(Path(name), ranks, [max(rank - 1, 0) for rank in ranks], int(name[-1]))
    return first


@pytest.fixture
def small() -> Interactions:
    """Users 0 to 3: too few; no repeat, with a tie; a repeat; a held-out item that the one before it repeats."""
    lengths, items = [2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7, 8, 6, 1, 2, 3, 4, 4]
    times = [5, 9, 10, 10, 11, 1, 2, 3, 4, 1, 2, 3, 4, 5]
    return Interactions(np.cumsum([0, *lengths]), np.array(items), np.array(times), 8)
