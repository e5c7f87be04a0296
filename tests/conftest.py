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

WORDS = [
    "red lipstick for women",
    "doll house kit for children",
    "camping tent for two people",
    "shampoo for curly hair",
    "usb cable with fast charging",
    "wooden toy train",
] * 5


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


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a T5 encoder of 22,000 random weights, 32 wide, that sentence-transformers loads."""
    pytest.importorskip("sentence_transformers", reason='needs pip install "recsys_lightning[text]"')
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    specials = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    config = T5Config(
        vocab_size=len(fast),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    folder = tmp_path_factory.mktemp("tiny_t5")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5EncoderModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
