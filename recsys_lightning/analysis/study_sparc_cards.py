"""What a level-1 code stands for: its size, its categories, its words and its most met items.

Axis letters: I items, C codes of level 1, V words.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from sklearn.feature_extraction.text import TfidfVectorizer

from recsys_lightning.analysis.study_sparc_codes import Ints
from recsys_lightning.analysis.user_values import Floats
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.text import compose_texts
from recsys_lightning.errors import InputError

TEXT_FIELDS = ("title", "brand", "description")
MOST_WORDS = 20_000  # of the vocabulary, the most frequent
WORDS, ITEMS, SHOWN_CATEGORIES = 8, 3, 3  # of a card
_TITLE = 60  # characters of an item's title


class Words(NamedTuple):
    """The words of the items' texts."""

    names: tuple[str, ...]  # (V,)
    tfidf: Floats  # (I, V), a sparse matrix with rows of unit length, or of zeros


class CodeCard(NamedTuple):
    """What is known of one code.

    Attributes:
        code: its number.
        items: that have it.
        interactions: share of the training interactions that fall on them.
        purity: share of the most frequent category among its items that have one; None without categories.
        categories: the most frequent ones with their shares.
        words: that stand out, the first most.
        top_items: its items most met in training, by title or, without one, raw id.
    """

    code: int
    items: int
    interactions: float
    purity: float | None
    categories: tuple[tuple[str, float], ...]
    words: tuple[str, ...]
    top_items: tuple[str, ...]


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
    texts = compose_texts(fields.select(known), [f"{{{name}}}" for name in known])
    vectorizer = TfidfVectorizer(
        token_pattern=r"(?u)\b[^\W\d_]{3,}\b",  # noqa: S106 - no password
        stop_words="english",
        sublinear_tf=True,
        max_features=MOST_WORDS,
        dtype=np.float64,
    )
    try:
        tfidf = vectorizer.fit_transform(texts)
    except ValueError as error:  # only stop words, or nothing at all
        raise InputError(f"the fields {', '.join(known)} hold no words: {error}") from error
    return Words(tuple(vectorizer.get_feature_names_out()), tfidf)


def standing_out(words: Words, codes: Ints, num_codes: int) -> Floats:
    """(C, V) mean TF-IDF of a word over the items of a code, less its mean over all items; a row of zeros for no items.

    Words that most items have are so worth nothing, whatever their number.
    """
    member = np.zeros((len(codes), num_codes))  # (I, C)
    member[np.arange(len(codes)), codes] = 1
    sizes = member.sum(0)  # (C,)
    sums = np.asarray(words.tfidf.T @ member).T  # (C, V)
    everywhere = sums.sum(0) / len(codes)  # (V,)
    return np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None] - everywhere, 0.0)


def code_cards(
    catalog: Catalog, codes: Ints, num_codes: int, words: Words, labels: Sequence[str | None] | None
) -> list[CodeCard]:
    """A card for each code that an item has, the largest first, of equals the lower number.

    Args:
        catalog: the items.
        codes: (I,) level-1 code of each.
        num_codes: C.
        words: of `item_words`.
        labels: (I,) category of each item, None where it has none; None without categories.
    """
    scores = standing_out(words, codes, num_codes)
    counts = np.asarray(catalog.train_counts)[1:]  # (I,)
    titles = _titles(catalog)
    cards = []
    for code in np.flatnonzero(np.bincount(codes, minlength=num_codes)):
        members = np.flatnonzero(codes == code)
        best = np.argsort(-scores[code], kind="stable")[:WORDS]
        most_met = members[np.argsort(-counts[members], kind="stable")[:ITEMS]]
        found: Counter[str] = Counter()
        if labels is not None:
            found.update(label for at in members.tolist() if (label := labels[at]) is not None)
        known = found.total()
        ordered = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))
        cards.append(
            CodeCard(
                code=int(code),
                items=len(members),
                interactions=float(counts[members].sum() / max(counts.sum(), 1)),
                purity=ordered[0][1] / known if known else None,
                categories=tuple((name, number / known) for name, number in ordered[:SHOWN_CATEGORIES]),
                words=tuple(words.names[at] for at in best.tolist() if scores[code, at] > 0),
                top_items=tuple(titles[at] for at in most_met.tolist()),
            )
        )
    return sorted(cards, key=lambda card: (-card.items, card.code))


def _titles(catalog: Catalog) -> list[str]:
    """What the items are called, cut to a line."""
    if "title" not in catalog.fields.columns:
        return catalog.raw_ids
    named = zip(catalog.fields.get_column("title").to_list(), catalog.raw_ids, strict=True)
    whole = [" ".join((title or raw_id).split()) for title, raw_id in named]
    return [text if len(text) <= _TITLE else f"{text[: _TITLE - 3].rstrip()}..." for text in whole]
