"""What a catalogue says of its items that codes can be held against: categories, words, titles and embeddings.

Axis letters: I items, V words, D width of an embedding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from recsys_lightning.analysis.codes_measures import CATEGORIES, Labels, category_labels, telling_level
from recsys_lightning.analysis.user_values import Floats
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.text import compose_texts
from recsys_lightning.errors import InputError

TEXT_FIELDS = ("title", "brand", "description")
MOST_WORDS = 20_000  # of the vocabulary, the most frequent
LEVELS = (1, 2, 3)  # of categories that codes are held against
_TITLE = 60  # characters of an item's title


class Words(NamedTuple):
    """The words of the items' texts."""

    names: tuple[str, ...]  # (V,) by alphabet
    tfidf: Floats  # (I, V), a sparse matrix with rows of unit length, or of zeros


class Facts(NamedTuple):
    """What is said of the items.

    Attributes:
        titles: (I,) or raw ids, cut to a line.
        words: None where there are no texts.
        labels: the category of each item; None without categories.
        vectors: (I, D) item embeddings; None where there are none.
    """

    titles: list[str]
    words: Words | None
    labels: Labels | None
    vectors: Tensor | None


def item_facts(catalog: Catalog) -> Facts:
    """All that a catalogue says of its items; what it lacks is None.

    Categories are those of the field ``categories``, at the first level that has two different ones. Words are those of
    title, brand and description.
    """
    labels = None
    if CATEGORIES in catalog.fields.columns:
        found = {level: category_labels(catalog.fields, CATEGORIES, level) for level in LEVELS}
        telling = telling_level(found)
        labels = found[telling] if telling else None
    return Facts(item_titles(catalog), find_words(catalog.fields, TEXT_FIELDS), labels, item_vectors(catalog))


def item_vectors(catalog: Catalog) -> Tensor | None:
    """(I, D) embeddings of the items, without the padding row; None if the data were prepared without an encoder."""
    return None if catalog.text is None else catalog.text_embeddings()[1:]


# -------------------------------------------------------------------------------------------------------------- words


def item_words(fields: pl.DataFrame, names: Sequence[str]) -> Words:
    """TF-IDF of the words of three letters or more in the items' texts, English stop words left out.

    Args:
        fields: of the catalogue, a row an item.
        names: fields whose text is read; those that the catalogue lacks are skipped.

    Raises:
        InputError: the catalogue has none of them, or there are no words.
    """
    known = [name for name in names if name in fields.columns and name != "item_id"]
    if not known:
        there = ", ".join(name for name in fields.columns if name != "item_id")
        raise InputError(f"the catalogue has no text field {' or '.join(names)}; there are: {there or 'none'}")
    words = find_words(fields, known)
    if words is None:
        raise InputError(f"the fields {', '.join(known)} hold no words")
    return words


def find_words(fields: pl.DataFrame, names: Sequence[str]) -> Words | None:
    """As `item_words`, but None if there are no such fields, or no words in them that are no stop words."""
    known = [name for name in names if name in fields.columns and name != "item_id"]
    if not known:
        return None
    vectorizer = TfidfVectorizer(
        token_pattern=r"(?u)\b[^\W\d_]{3,}\b",  # noqa: S106 - no password
        stop_words="english",
        sublinear_tf=True,
        max_features=MOST_WORDS,
        dtype=np.float64,
    )
    texts = compose_texts(fields.select(known), [f"{{{name}}}" for name in known])
    try:
        tfidf = vectorizer.fit_transform(texts)
    except ValueError:  # its word for an empty vocabulary
        return None
    return Words(tuple(vectorizer.get_feature_names_out()), tfidf)


def item_titles(catalog: Catalog) -> list[str]:
    """What the items are called, cut to a line; by raw id where there is no title."""
    if "title" not in catalog.fields.columns:
        return catalog.raw_ids
    named = zip(catalog.fields.get_column("title").to_list(), catalog.raw_ids, strict=True)
    whole = [" ".join((title or raw_id).split()) for title, raw_id in named]
    return [text if len(text) <= _TITLE else f"{text[: _TITLE - 3].rstrip()}..." for text in whole]
