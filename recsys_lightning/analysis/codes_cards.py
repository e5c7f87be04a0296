"""What codes stand for: of each code its size, its categories, its words, its most met items and its nearest codes.

A code of level l is a prefix of l codes: at level 1 a code by itself, at level 2 a pair (c1, c2).

Axis letters: I items, C prefixes in use, V words, D width of an embedding.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse  # type: ignore[import-untyped]

from recsys_lightning.analysis.codes_facts import Facts, Words, item_facts
from recsys_lightning.analysis.codes_measures import Ints, prefix_numbers
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.table import SemanticIds

Prefix = tuple[int, ...]
WORDS, ITEMS, SHOWN_CATEGORIES, NEAREST = 8, 3, 3, 3  # of a card
_ROWS = 1024  # codes whose similarities to all others are held at once


class CodeCard(NamedTuple):
    """What is known of one code.

    Attributes:
        level: l, the number of codes in the prefix.
        prefix: (c1, .., cl).
        items: that have it.
        interactions: share of the training interactions that fall on them.
        purity: share of the most frequent category among its items that have one; None without categories.
        categories: the most frequent ones with their shares.
        words: that stand out, the first most; none where the catalogue has no texts.
        top_items: its items most met in training, by title or, without one, raw id.
        nearest: other prefixes of the same length, the nearest first, with the similarity of `nearest_codes`; none
            where the catalogue has no item embeddings.
    """

    level: int
    prefix: Prefix
    items: int
    interactions: float
    purity: float | None
    categories: tuple[tuple[str, float], ...]
    words: tuple[str, ...]
    top_items: tuple[str, ...]
    nearest: tuple[tuple[Prefix, float], ...]


def code_cards(
    table: SemanticIds, catalog: Catalog, level: int, shown: int | None = None, facts: Facts | None = None
) -> list[CodeCard]:
    """A card for each code of a level that an item has, the largest first, of equals the lower number.

    Args:
        table: the codes of the items.
        catalog: the same items.
        level: of the codes, 1 .. L.
        shown: cards to write, of the largest; None writes all. Nearest codes are looked for among all of them.
        facts: of `item_facts`, for cards of several tables and levels; None takes them from the catalogue.

    Raises:
        InputError: the table has no such level, or another number of items than the catalogue.
    """
    if table.num_items != catalog.num_items:
        raise InputError(
            f"the semantic IDs are of {table.num_items} items but the catalogue has {catalog.num_items}: they are of "
            "other data"
        )
    if facts is None:
        facts = item_facts(catalog)
    number, prefixes = prefix_numbers(table, level)
    sizes = np.bincount(number)  # (C,)
    order = np.argsort(-sizes, kind="stable")[:shown]
    words = standing_out(facts.words, number, order)
    nearest = nearest_codes(facts.vectors, number, order)
    counts = np.asarray(catalog.train_counts)[1:]  # (I,)
    total = max(int(counts.sum()), 1)
    # The items of each prefix are one stretch of this order, the most met first.
    by_code = np.lexsort((-counts, number))  # (I,)
    stops = sizes.cumsum()
    cards = []
    for at, code in enumerate(order.tolist()):
        members = by_code[stops[code] - sizes[code] : stops[code]]
        categories, known = _categories(facts, members)
        cards.append(
            CodeCard(
                level=level,
                prefix=tuple(prefixes[code].tolist()),
                items=len(members),
                interactions=float(counts[members].sum() / total),
                purity=categories[0][1] / known if known else None,
                categories=tuple((name, items / known) for name, items in categories[:SHOWN_CATEGORIES]),
                words=words[at],
                top_items=tuple(facts.titles[item] for item in members[:ITEMS].tolist()),
                nearest=tuple((tuple(prefixes[other].tolist()), alike) for other, alike in nearest[at]),
            )
        )
    return cards


def standing_out(words: Words | None, number: Ints, wanted: Iterable[int]) -> list[tuple[str, ...]]:
    """The words of each wanted prefix whose mean TF-IDF over its items is furthest above that over all items.

    Words that most items have are so worth nothing, whatever their number; of equals the first by alphabet.

    Args:
        words: of the items; None for no words at all.
        number: (I,) of each item's prefix.
        wanted: numbers of prefixes.
    """
    if words is None:
        return [() for _ in wanted]
    sizes = np.bincount(number)  # (C,)
    member = sparse.csr_matrix((1 / sizes[number], (number, np.arange(len(number)))))  # (C, I), rows sum to 1
    means = (member @ words.tfidf).tocsr()  # (C, V)
    everywhere = np.asarray(words.tfidf.mean(0)).ravel()  # (V,)
    found = []
    for code in wanted:
        row = slice(means.indptr[code], means.indptr[code + 1])
        columns = means.indices[row]
        above = means.data[row] - everywhere[columns]
        best = np.lexsort((columns, -above))[:WORDS]
        found.append(tuple(words.names[columns[at]] for at in best if above[at] > 0))
    return found


def nearest_codes(
    vectors: torch.Tensor | None, number: Ints, wanted: Sequence[int] | Ints
) -> list[list[tuple[int, float]]]:
    """The prefixes nearest to each wanted one, and how near: the cosine between mean embeddings of their items.

    The mean embedding of all items is taken away first: text embeddings have a large part in common, beside which all
    codes look alike. So 0 is what two unrelated codes have, and below 0 lies what is less alike than that.

    Args:
        vectors: (I, D) of the items; None for none.
        number: (I,) of each item's prefix.
        wanted: numbers of prefixes.
    """
    if vectors is None:
        return [[] for _ in wanted]
    of_item = torch.from_numpy(number)
    sizes = of_item.bincount()  # (C,)
    sums = vectors.new_zeros(len(sizes), vectors.shape[1]).index_add_(0, of_item, vectors - vectors.mean(0))
    means = F.normalize(sums / sizes[:, None], dim=1)  # (C, D)
    found = []
    for rows in torch.split(torch.as_tensor(np.array(wanted, dtype=np.int64)), _ROWS):
        alike = means[rows] @ means.T  # (rows, C)
        alike[torch.arange(len(rows)), rows] = -torch.inf
        best = alike.topk(min(NEAREST, len(means) - 1), dim=1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found += [list(zip(codes, values, strict=True)) for codes, values in pairs]
    return found


def _categories(facts: Facts, members: Ints) -> tuple[list[tuple[str, int]], int]:
    """The categories of these items with their number of items, the most frequent first; and how many have one."""
    if facts.labels is None:
        return [], 0
    found = Counter(label for at in members.tolist() if (label := facts.labels[at]) is not None)
    return sorted(found.items(), key=lambda pair: (-pair[1], pair[0])), found.total()
