"""Item texts and their vectors: what a template promises, and when a cached file counts."""

import logging

import numpy as np
import polars as pl
import pytest

from recsys_lightning.data.encoders import TextEncoder
from recsys_lightning.data.text import compose_texts, embed_texts, find_embeddings
from recsys_lightning.errors import InputError


class Lengths(TextEncoder):
    """Writes the length of a text; counts how often it is asked."""

    def __init__(self, name: str = "lengths") -> None:
        self.name = name
        self.calls = 0

    @property
    def identity(self) -> str:
        return self.name

    def encode(self, texts: list[str]) -> np.ndarray:
        self.calls += 1
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)


# ---------------------------------------------------------------------------------------------------- composing


def test_segments_with_a_blank_field_are_dropped():
    fields = pl.DataFrame(
        {
            "title": ["Lipstick", "Tent", None, "Doll"],
            "brand": ["Acme", "  ", "Umbra", None],
            "price": [3.5, None, float("nan"), 2.0],
            "categories": [["Beauty", "Lips"], [], None, ["Toys"]],
        }
    )
    template = ["{title}", "Brand: {brand}", "Price: {price}", "Categories: {categories}", "{title} by {brand}"]
    assert compose_texts(fields, template) == [
        "Lipstick. Brand: Acme. Price: 3.5. Categories: Beauty, Lips. Lipstick by Acme",
        "Tent",
        "Brand: Umbra",
        "Doll. Price: 2.0. Categories: Toys",
    ]


def test_an_item_without_text_is_the_empty_string_and_keeps_its_place():
    fields = pl.DataFrame({"title": ["a", None, "\n c  d "]})
    assert compose_texts(fields, ["{title}"], separator=" | ") == ["a", "", "c d"]


def test_braces_in_a_value_and_doubled_braces_stay_as_they_are():
    assert compose_texts(pl.DataFrame({"title": ["{brand}"]}), ["{{{title}}}"]) == ["{{brand}}"]


def test_an_absent_column_drops_its_segment_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, logger="recsys_lightning"):
        texts = compose_texts(pl.DataFrame({"title": ["a", "b"]}), ["{title}", "Price: {price}", "{title} {brand}"])
    assert texts == ["a", "b"]
    (record,) = caplog.records
    assert "['brand', 'price']" in record.getMessage()
    assert "['title']" in record.getMessage()


def test_a_template_without_any_existing_column_is_refused_with_the_columns():
    with pytest.raises(InputError, match=r"no column \['price'\].*exist: \['title', 'brand'\]"):
        compose_texts(pl.DataFrame({"title": ["a"], "brand": ["b"]}), ["{price}"])


@pytest.mark.parametrize(
    "segment", ["{title.__class__}", "{title[0]}", "{title!r}", "{title:>9}", "{}", "{0}", "{title", "no field"]
)
def test_only_plain_placeholders_are_allowed(segment):
    with pytest.raises(InputError, match="text template segment"):
        compose_texts(pl.DataFrame({"title": ["a"]}), [segment])


@pytest.mark.parametrize("template", ["{title}", []])
def test_a_template_that_is_no_list_is_refused(template):
    with pytest.raises(InputError, match="non-empty list of segments"):
        compose_texts(pl.DataFrame({"title": ["a"]}), template)


# -------------------------------------------------------------------------------------------------------- cache


def test_the_second_call_only_loads(tmp_path):
    encoder = Lengths()
    first = embed_texts(["a", "", "ccc"], encoder, tmp_path / "new" / "folder")
    second = embed_texts(["a", "", "ccc"], encoder, tmp_path / "new" / "folder")
    assert encoder.calls == 1
    assert second.fingerprint == first.fingerprint
    assert second.encoder == "lengths"
    np.testing.assert_array_equal(second.vectors, [[0, 0], [1, 1], [0, 1], [3, 1]])


def test_vectors_are_mapped_read_only_float32(tmp_path):
    vectors = embed_texts(["a"], Lengths(), tmp_path).vectors
    assert isinstance(vectors, np.memmap)
    assert vectors.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        vectors[0, 0] = 1


def test_changed_texts_or_encoder_make_a_new_file(tmp_path):
    runs = [(["ab", "c"], "x"), (["a", "bc"], "x"), (["c", "ab"], "x"), (["ab", "c"], "y")]
    fingerprints = {embed_texts(texts, Lengths(name), tmp_path).fingerprint for texts, name in runs}
    assert len(fingerprints) == 4
    assert {path.stem for path in tmp_path.glob("*.npy")} == {f"text-{digest[:16]}" for digest in fingerprints}


@pytest.mark.parametrize("damage", ["truncated", "empty", "longer", "other shape", "about is no JSON", "no about"])
def test_a_damaged_file_is_computed_again(tmp_path, damage):
    texts, encoder = ["a", "bb", "ccc"], Lengths()
    embed_texts(texts, encoder, tmp_path)
    (file,), (about,) = tmp_path.glob("*.npy"), tmp_path.glob("*.json")
    content = file.read_bytes()
    match damage:
        case "truncated":
            file.write_bytes(content[:-5])
        case "empty":
            file.write_bytes(b"")
        case "longer":
            file.write_bytes(content + b"x")
        case "other shape":
            np.save(file, np.zeros((3, 2), dtype=np.float32))
        case "about is no JSON":
            about.write_text("{")
        case "no about":
            about.unlink()
    assert find_embeddings(texts, encoder, tmp_path) is None
    np.testing.assert_array_equal(embed_texts(texts, encoder, tmp_path).vectors[:, 0], [0, 1, 2, 3])
    assert encoder.calls == 2
    assert file.read_bytes() == content


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(file, *args, **kwargs):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(InputError, match="No space left"):
        embed_texts(["a"], Lengths(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nan_vectors_are_refused_with_the_item(tmp_path):
    class Broken(Lengths):
        def encode(self, texts):
            return np.array([[0.0], [np.nan]], dtype=np.float32)

    with pytest.raises(InputError, match=r"NaN.*1 of 2 texts.*item 2 \('bb'\)"):
        embed_texts(["a", "bb"], Broken(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_texts_are_refused(tmp_path):
    with pytest.raises(InputError, match="no item texts"):
        embed_texts([], Lengths(), tmp_path)
