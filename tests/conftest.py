import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.data.text import ItemEmbeddings
from recsys_lightning.semantic_ids.table import SemanticIds


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real raw files; the test is skipped where there is none."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("RECSYS_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip("no real data: set RECSYS_SHARED_DATA")
    return folder


@pytest.fixture
def catalog() -> Catalog:
    """37 items with random text embeddings of width 12, words to read, and unequal popularity."""
    rng = np.random.default_rng(0)
    vectors = np.concatenate([np.zeros((1, 12)), rng.normal(size=(37, 12))]).astype(np.float32)
    words = [f"{rng.choice(['red', 'blue'])} {rng.choice(['soap', 'brush', 'cream'])} {i}" for i in range(37)]
    fields = pl.DataFrame(
        {"item_id": [f"raw{i}" for i in range(37)], "title": words, "brand": ["acme", None] * 18 + [None]}
    )
    counts = np.concatenate([[0], rng.integers(1, 30, 37)])
    return Catalog(fields, counts, ItemEmbeddings(vectors, "f" * 64, "random"))


@pytest.fixture
def semantic_ids() -> SemanticIds:
    """3 levels of 4 codes for the 37 items of `catalog`; several items share a cell."""
    codes = torch.randint(0, 4, (38, 3), generator=torch.Generator().manual_seed(1))
    codes[20:26] = codes[19]  # one crowded cell
    codes[0] = 0
    return SemanticIds(codes=codes, num_codes=4, embeddings_fingerprint="f" * 64, tokenizer="random")


def make_batch(*histories: list[int], targets: list[int] | None = None, width: int | None = None) -> SequenceBatch:
    """A batch of the given histories, padded to `width` or to the longest."""
    width = max(map(len, histories)) if width is None else width
    history = torch.tensor([[*h, *[0] * (width - len(h))] for h in histories])
    target = torch.tensor(targets or [1] * len(histories))[:, None]
    return SequenceBatch(
        torch.arange(len(histories)), history, target, torch.zeros(len(histories), 0, dtype=torch.long)
    )


@pytest.fixture
def batch_of():
    """Makes a `SequenceBatch` from histories; see `make_batch`."""
    return make_batch
