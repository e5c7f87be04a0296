"""Item encoders: what they read, what they ignore, and what survives a checkpoint."""

import polars as pl
import pytest
import torch

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.errors import InputError
from recsys_lightning.nn.item_encoders import EmbeddingItemEncoder, TextItemEncoder

pytest.importorskip("tokenizers")


@pytest.fixture
def text_encoder(catalog):
    torch.manual_seed(0)
    return TextItemEncoder(catalog, 16, vocabulary_size=80).eval()


def test_embedding_encoder_reads_only_the_items_own_row(catalog):
    encoder = EmbeddingItemEncoder(catalog, 16).eval()
    before = encoder(torch.tensor([3, 5]))
    encoder.embeddings[7] += 1
    torch.testing.assert_close(encoder(torch.tensor([3, 5])), before)
    encoder.embeddings[5] += 1
    assert not torch.allclose(encoder(torch.tensor([5])), before[1:])


def test_embeddings_stay_frozen_and_out_of_checkpoints(catalog):
    encoder = EmbeddingItemEncoder(catalog, 16)
    assert "embeddings" not in encoder.state_dict()
    assert "embeddings" not in dict(encoder.named_parameters())


def test_text_starts_with_cls_and_marks_fields(text_encoder, catalog):
    """Item 1 is "<colour> <thing> 0" by acme: [CLS] of type 0, title tokens of type 1, brand tokens of type 2."""
    tokens, types = text_encoder.tokens[1], text_encoder.types[1]
    assert tokens[0] == 1
    assert types[0] == 0
    words = [len(text_encoder.tokenizer.encode(catalog.fields[name][0]).ids) for name in ("title", "brand")]
    assert types[1 : 1 + sum(words)].tolist() == [1] * words[0] + [2] * words[1]


def test_a_long_text_beside_it_does_not_change_an_item(text_encoder):
    lengths = (text_encoder.tokens != 0).sum(1)
    short, long = int(lengths[1:].argmin()) + 1, int(lengths[1:].argmax()) + 1
    alone = text_encoder(torch.tensor([short]))
    beside = text_encoder(torch.tensor([short, long]))
    torch.testing.assert_close(alone[0], beside[0], atol=1e-6, rtol=1e-5)


def test_reading_in_chunks_gives_each_item_its_own_vector(text_encoder, monkeypatch):
    ids = torch.tensor([9, 2, 30, 17, 5])
    whole = text_encoder(ids)
    monkeypatch.setattr("recsys_lightning.nn.item_encoders.CHUNK", 2)
    torch.testing.assert_close(text_encoder(ids), whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat([text_encoder(i[None]) for i in ids]), whole, atol=1e-6, rtol=1e-5)
    assert text_encoder(ids[:0]).shape == (0, 16)


def test_word_order_and_fields_matter(catalog):
    """Bidirectional attention with positions and field types: moving a word to another field gives another vector."""
    fields = pl.DataFrame(
        {"item_id": ["a", "b", "c"], "title": ["red soap", "soap red", "red"], "brand": [None, None, "soap"]}
    )
    torch.manual_seed(0)
    encoder = TextItemEncoder(Catalog(fields, catalog.train_counts[:4]), 16, vocabulary_size=60).eval()
    vectors = encoder(torch.tensor([1, 2, 3]))
    assert torch.cdist(vectors, vectors)[~torch.eye(3, dtype=torch.bool)].min() > 1e-3


def test_max_tokens_cuts_the_end(catalog):
    encoder = TextItemEncoder(catalog, 16, vocabulary_size=80, max_tokens=3)
    assert encoder.tokens.shape[1] == 3


def test_a_checkpoint_brings_its_vocabulary(catalog, text_encoder):
    torch.manual_seed(1)
    other = TextItemEncoder(catalog, 16, vocabulary_size=40).eval()
    same = TextItemEncoder(catalog, 16, vocabulary_size=80).eval()
    same.load_state_dict(text_encoder.state_dict())
    ids = torch.arange(1, 38)
    torch.testing.assert_close(same(ids), text_encoder(ids))
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(text_encoder.state_dict())


def test_the_vocabulary_is_the_same_each_time(catalog):
    """Ranks of one job train it apart: with ties left to chance they would disagree on what a token means."""
    encoders = [TextItemEncoder(catalog, 16, vocabulary_size=80) for _ in range(10)]
    assert len({encoder.get_extra_state() for encoder in encoders}) == 1
    assert all(torch.equal(encoder.tokens, encoders[0].tokens) for encoder in encoders)


def test_settings_of_the_transformer_are_used(catalog):
    shallow, deep = (TextItemEncoder(catalog, 16, num_layers=n, vocabulary_size=60) for n in (1, 2))
    assert len(deep.transformer.layers) == len(shallow.transformer.layers) + 1
    wide = TextItemEncoder(catalog, 16, feedforward=10, vocabulary_size=60)
    assert wide.transformer.layers[0].feedforward[0].out_features == 10


def test_unknown_fields_name_those_there_are(catalog):
    with pytest.raises(InputError, match=r"no text field of \['colour'\].*title"):
        TextItemEncoder(catalog, 16, fields=("colour",))


def test_a_pretrained_vocabulary_comes_by_folder(catalog, tmp_path):
    """The recipe of a tiny BERT made on the spot: its tokenizer is used, and its token embeddings if asked."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "red", "blue", "soap", "brush", "cream", "acme"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    bert = transformers.BertModel(config)
    bert.save_pretrained(tmp_path)
    scratch = TextItemEncoder(catalog, 16, vocabulary=str(tmp_path))
    assert scratch.tokens.max() <= 9
    loaded = TextItemEncoder(catalog, 16, vocabulary=str(tmp_path), pretrained_tokens=True)
    torch.testing.assert_close(loaded.token.weight[2:10], bert.get_input_embeddings().weight)
    assert loaded(torch.tensor([1, 2])).shape == (2, 16)  # through the layer that widens 8 to 16


def test_an_unknown_pretrained_vocabulary_says_what_to_do(catalog, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"cannot load vocabulary './no-such-folder'.*vocabulary: catalogue"):
        TextItemEncoder(catalog, 16, vocabulary="./no-such-folder")
