"""Text encoders: what their vectors promise, and what happens when a model cannot be had."""

import logging
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from recsys_lightning.data.encoders import SentenceTransformerEncoder, TfidfSVD
from recsys_lightning.data.text import embed_texts, find_embeddings
from recsys_lightning.errors import InputError

TEXTS = ["red lipstick", "doll house kit", "camping tent", "red shampoo", "doll for children", "tent kit"]
MISSING = "recsys-lightning-tests/no-such-model"


# ------------------------------------------------------------------------------------------------------- TF-IDF


def test_tfidf_is_deterministic_unit_length_and_sees_shared_words():
    first, second = TfidfSVD(dim=4, min_df=1).encode(TEXTS), TfidfSVD(dim=4, min_df=1).encode(TEXTS)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (6, 4)
    assert first.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-5)
    assert first[0] @ first[3] > first[0] @ first[1]  # red lipstick: red shampoo, not doll house kit


def test_tfidf_at_full_rank_keeps_the_cosines_of_tfidf_by_hand():
    texts = ["red tent", "red doll", "tent"]
    words = ["red", "tent", "doll", "red tent", "red doll"]
    counts = np.array([[text == word or word in text.split() for word in words] for text in texts], dtype=float)
    idf = np.log((1 + 3) / (1 + counts.sum(0))) + 1  # scikit-learn's smoothed form
    weights = counts * idf
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    vectors = TfidfSVD(dim=3, min_df=1).encode(texts)
    np.testing.assert_allclose(vectors @ vectors.T, weights @ weights.T, atol=1e-5)


def test_tfidf_pads_with_zeros_what_the_texts_cannot_fill(caplog):
    with caplog.at_level(logging.INFO, logger="recsys_lightning"):
        vectors = TfidfSVD(dim=10, min_df=1).encode(["tent", "tent", "doll"])
    assert vectors.shape == (3, 10)
    assert not vectors[:, 2:].any()
    assert vectors[0] @ vectors[2] == pytest.approx(0, abs=1e-6)
    assert "2 of 10 columns" in caplog.text


def test_tfidf_takes_a_single_word():
    np.testing.assert_array_equal(TfidfSVD(dim=2, min_df=1).encode(["tent", "", "tent"]), [[1, 0], [0, 0], [1, 0]])


def test_tfidf_gives_zeros_to_items_without_known_words():
    vectors = TfidfSVD(dim=3, min_df=2).encode(["red tent", "", "red tent", "unheard"])
    assert not vectors[[1, 3]].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[[0, 2]], axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("texts", "message"), [(["", " "], "all 2 item texts are empty"), (["a1", "b2"], "min_df=2.*set min_df to 1")]
)
def test_tfidf_refuses_texts_that_say_nothing(texts, message):
    with pytest.raises(InputError, match=message):
        TfidfSVD(dim=2).encode(texts)


def test_every_tfidf_setting_is_part_of_its_identity():
    encoders = [TfidfSVD(), TfidfSVD(dim=8), TfidfSVD(min_df=3), TfidfSVD(max_features=9), TfidfSVD(seed=1)]
    assert len({encoder.identity for encoder in encoders}) == 5


# -------------------------------------------------------------------------------------------- sentence-transformers


def test_a_local_model_gives_unit_vectors_in_the_order_of_the_texts(tiny_t5, tmp_path):
    encoder = SentenceTransformerEncoder(str(tiny_t5), batch_size=2, device="cpu")
    texts = ["tent", "red lipstick for women", "", "doll house"]
    found = embed_texts(texts, encoder, tmp_path)
    assert found.vectors.shape == (5, 32)
    assert not found.vectors[0].any()
    np.testing.assert_allclose(np.linalg.norm(found.vectors[1:], axis=1), 1, rtol=1e-5)
    for item, text in enumerate(texts, start=1):
        np.testing.assert_allclose(found.vectors[item], encoder.encode([text])[0], atol=1e-5)


def test_the_model_is_not_touched_when_the_vectors_are_cached(tiny_t5, tmp_path, monkeypatch):
    first = embed_texts(TEXTS, SentenceTransformerEncoder(str(tiny_t5), device="cpu"), tmp_path)

    def refuse(self):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(SentenceTransformerEncoder, "load", refuse)
    second = embed_texts(TEXTS, SentenceTransformerEncoder(str(tiny_t5), device="cpu"), tmp_path)
    assert second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(second.vectors, first.vectors)


def test_max_tokens_cuts_the_text(tiny_t5):
    encoder = SentenceTransformerEncoder(str(tiny_t5), device="cpu", max_tokens=3)
    vectors = encoder.encode(["camping tent for two people", "camping tent for two women"])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_identity_follows_the_weights_and_the_settings_but_not_the_place(tiny_t5, tmp_path):
    copy = shutil.copytree(tiny_t5, tmp_path / "copy")
    encoder = SentenceTransformerEncoder(str(copy))
    before = encoder.identity
    assert before == SentenceTransformerEncoder(str(tiny_t5), batch_size=1, device="cpu").identity
    assert before != SentenceTransformerEncoder(str(copy), normalize=False).identity
    assert before != SentenceTransformerEncoder(str(copy), max_tokens=8).identity
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert encoder.identity != before


def test_identity_of_a_hub_model_names_the_revision():
    assert SentenceTransformerEncoder(MISSING, revision="abc").identity.startswith(
        f"SentenceTransformer {MISSING}@abc "
    )
    assert f"{MISSING}@main" in SentenceTransformerEncoder(MISSING).identity


def test_weights_that_give_nan_are_refused(tiny_t5, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    copy = shutil.copytree(tiny_t5, tmp_path / "copy")
    weights = safetensors.load_file(copy / "model.safetensors")
    for tensor in weights.values():
        tensor.fill_(float("nan"))
    safetensors.save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"NaN.*2 of 2 texts"):
        SentenceTransformerEncoder(str(copy), device="cpu").encode(["tent", "doll"])


@pytest.mark.parametrize("name", ["./no-such-folder", "~/no-such-folder", "/no-such-folder/model", "models/no-such"])
def test_a_missing_folder_is_an_error_even_with_a_fallback(name, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    encoder = SentenceTransformerEncoder(name, offline_fallback=TfidfSVD())
    with pytest.raises(InputError, match=r"folder .*no-such.* does not exist"):
        encoder.resolve()


def test_a_folder_without_a_model_is_an_error(tmp_path):
    pytest.importorskip("sentence_transformers", reason='needs pip install "recsys_lightning[text]"')
    with pytest.raises(InputError, match="cannot be loaded"):
        SentenceTransformerEncoder(str(tmp_path), offline_fallback=TfidfSVD()).resolve()


def test_without_sentence_transformers_the_cure_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "recsys_lightning\[text\]"'):
        SentenceTransformerEncoder(MISSING).load()


@pytest.fixture
def hub_says(monkeypatch):
    """Let the hub answer with an exception, without a network."""
    hub = pytest.importorskip("huggingface_hub", reason='needs pip install "recsys_lightning[text]"')
    pytest.importorskip("sentence_transformers", reason='needs pip install "recsys_lightning[text]"')

    def answer(error):
        def model_info(self, name, *, revision=None, timeout=None):
            assert timeout is not None
            assert timeout <= 10
            raise error

        monkeypatch.setattr(hub.HfApi, "model_info", model_info)

    return answer


def unreachable():
    errors = pytest.importorskip("huggingface_hub.errors")
    wrapped = OSError("We couldn't connect to 'https://huggingface.co' to load the files")
    chained = RuntimeError("loading failed")
    chained.__cause__ = socket.gaierror(-2, "Name or service not known")
    return [ConnectionError("refused"), TimeoutError("slow"), errors.OfflineModeIsEnabled("offline"), wrapped, chained]


@pytest.mark.parametrize("case", range(5))
def test_an_unreachable_hub_names_both_cures(hub_says, case):
    hub_says(unreachable()[case])
    with pytest.raises(InputError) as caught:
        SentenceTransformerEncoder(MISSING).resolve()
    message = str(caught.value)
    assert MISSING in message
    assert "--data.encoder.init_args.model DIR" in message
    assert "RECSYS_TEXT_MODEL" in message
    assert "--data.encoder TfidfSVD" in message
    assert "\n" not in message


def test_an_unreachable_hub_falls_back_with_a_warning(hub_says, tmp_path, caplog):
    hub_says(ConnectionError("refused"))
    encoder = SentenceTransformerEncoder(MISSING, offline_fallback=TfidfSVD(dim=4, min_df=1))
    assert find_embeddings(TEXTS, encoder, tmp_path) is None
    made = embed_texts(TEXTS, encoder, tmp_path)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert MISSING in warning.getMessage()
    assert "TfidfSVD" in warning.getMessage()
    assert "not comparable" in warning.getMessage()
    assert made.encoder == TfidfSVD(dim=4, min_df=1).identity
    np.testing.assert_array_equal(made.vectors[1:], TfidfSVD(dim=4, min_df=1).encode(TEXTS))

    caplog.clear()
    found = find_embeddings(TEXTS, encoder, tmp_path)
    assert found is not None
    assert found.fingerprint == made.fingerprint
    assert "not comparable" in caplog.text


def test_the_encoder_itself_is_found_before_its_fallback(tiny_t5, tmp_path):
    fallback = TfidfSVD(dim=4, min_df=1)
    encoder = SentenceTransformerEncoder(str(tiny_t5), device="cpu", offline_fallback=fallback)
    embed_texts(TEXTS, fallback, tmp_path)
    wanted = embed_texts(TEXTS, encoder, tmp_path)
    found = find_embeddings(TEXTS, encoder, tmp_path)
    assert found is not None
    assert found.encoder == wanted.encoder == encoder.identity


@pytest.mark.parametrize("kind", ["RepositoryNotFoundError", "RevisionNotFoundError", "HfHubHTTPError"])
def test_a_hub_that_says_no_is_an_error_even_with_a_fallback(hub_says, kind):
    errors = pytest.importorskip("huggingface_hub.errors")

    class Response:
        status_code, headers, request = 403, {}, None

    hub_says(getattr(errors, kind)("the hub said no", response=Response()))
    with pytest.raises(InputError, match=MISSING) as caught:
        SentenceTransformerEncoder(MISSING, revision="v9", offline_fallback=TfidfSVD()).resolve()
    assert "cannot be reached" not in str(caught.value)


def put_in_hub_cache(folder: Path, cache: Path) -> None:
    """Lay a model folder into a hub cache, as a download leaves it."""
    commit = "0123456789" * 4
    repository = cache / f"models--{MISSING.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def test_a_cached_hub_model_needs_no_hub(hub_says, tmp_path, monkeypatch, tiny_t5):
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(tiny_t5), device="cpu").save(str(tmp_path / "saved"))
    put_in_hub_cache(tmp_path / "saved", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub_says(AssertionError("the hub was asked"))
    vectors = SentenceTransformerEncoder(MISSING, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(vectors, SentenceTransformerEncoder(str(tiny_t5), device="cpu").encode(TEXTS), atol=1e-6)


def test_a_cached_model_without_its_modules_file_is_not_taken_for_the_whole(hub_says, tmp_path, monkeypatch, tiny_t5):
    """Loaded without modules.json, Sentence-T5 would lose its dense layer and give other vectors in silence."""
    put_in_hub_cache(tiny_t5, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub_says(ConnectionError("refused"))
    with pytest.raises(InputError, match="cannot be reached"):
        SentenceTransformerEncoder(MISSING, device="cpu").load()
