"""What a card says of a code, on a catalogue that a person can picture."""

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.analysis.codes_cards import NEAREST, code_cards, nearest_codes, standing_out
from recsys_lightning.analysis.codes_facts import item_facts, item_words
from recsys_lightning.analysis.codes_measures import prefix_numbers
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.text import ItemEmbeddings
from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.table import SemanticIds

# Eight items: four soaps and three combs; the last has no category.
TITLES = ["Rose Soap", "Lily Soap", "Rose Soap Two", "Plain Soap", "Wood Comb", "Horn Comb", "Rose Comb", "Nothing"]
CATEGORIES = ["Care > Soap", "Care > Soap", "Care > Soap; Gifts", "Care > Soap", *["Care > Comb"] * 3, None]
COUNTS = np.array([0, 5, 9, 1, 7, 2, 8, 3, 4])
GOOD = [[2, 0], [2, 1], [2, 0], [2, 1], [0, 0], [0, 0], [0, 1], [0, 2]]
BAD = [[0], [1], [0], [1], [0], [1], [0], [1]]
VECTORS = np.array([[0, 0], [9, 1], [9, 1], [9, 1], [9, 3], [1, 9], [1, 9], [2, 9], [0, 5]], dtype=np.float32)


def fields(**columns: list) -> pl.DataFrame:
    ids = {"item_id": [f"raw{at}" for at in range(8)]}
    return pl.DataFrame(ids | (columns or {"title": TITLES, "categories": CATEGORIES}))


def catalog_of(table: pl.DataFrame | None = None, vectors: np.ndarray | None = None) -> Catalog:
    text = None if vectors is None else ItemEmbeddings(vectors, "f" * 64, "by hand")
    return Catalog(fields() if table is None else table, COUNTS, text)


def table_of(codes: list[list[int]], num_codes: int = 4) -> SemanticIds:
    return SemanticIds(F.pad(torch.tensor(codes), (0, 0, 1, 0)), num_codes, "f" * 64, "by hand")


def test_a_card_says_what_is_in_its_code():
    cards = code_cards(table_of(GOOD), catalog_of(), level=1)
    assert [(card.level, card.prefix, card.items) for card in cards] == [(1, (0,), 4), (1, (2,), 4)]
    comb, soap = cards
    assert soap.words[0] == "soap"
    assert comb.words[0] == "comb"
    assert soap.top_items == ("Lily Soap", "Plain Soap", "Rose Soap"), "the most met in training first"
    assert soap.interactions == pytest.approx((5 + 9 + 1 + 7) / 39)
    assert comb.categories == (("Comb", 1.0),), "of level 2: all are Care at level 1"
    assert comb.purity == 1, "the item without a category does not count"
    assert comb.nearest == (), "there are no embeddings"


def test_purity_is_the_share_of_the_most_frequent_category_of_the_code():
    first, second = code_cards(table_of(BAD), catalog_of(), level=1)
    # Code 0: Rose Soap, Rose Soap Two, Wood Comb, Rose Comb. Code 1: Lily Soap, Plain Soap, Horn Comb, Nothing.
    assert (first.purity, second.purity) == pytest.approx((1 / 2, 2 / 3))
    assert first.categories == (("Comb", 0.5), ("Soap", 0.5))


def test_level_two_has_a_card_a_pair_of_codes():
    cards = code_cards(table_of(GOOD), catalog_of(), level=2)
    assert [(card.prefix, card.items) for card in cards] == [
        ((0, 0), 2),
        ((2, 0), 2),
        ((2, 1), 2),
        ((0, 1), 1),
        ((0, 2), 1),
    ], "the largest first, of equals the lower"
    rose = next(card for card in cards if card.prefix == (2, 0))
    assert rose.top_items == ("Rose Soap", "Rose Soap Two")
    assert set(rose.words[:2]) == {"rose", "soap"}
    assert rose.interactions == pytest.approx((5 + 1) / 39)


@pytest.mark.parametrize("level", [1, 2])
def test_the_largest_are_shown_and_are_the_same_cards(level):
    catalog, table = catalog_of(vectors=VECTORS), table_of(GOOD)
    everything = code_cards(table, catalog, level)
    for same in (
        code_cards(table, catalog, level, shown=2),
        code_cards(table, catalog, level, facts=item_facts(catalog)),
    ):
        for card, expected in zip(same, everything, strict=False):
            assert card._replace(nearest=()) == expected._replace(nearest=())
            assert [code for code, _ in card.nearest] == [code for code, _ in expected.nearest]
    assert len(code_cards(table, catalog, level, shown=1)) == 1


def test_a_level_that_is_not_there_and_items_of_other_data_are_refused():
    with pytest.raises(InputError, match="no codes of level 3"):
        code_cards(table_of(GOOD), catalog_of(), level=3)
    with pytest.raises(InputError, match="are of 7 items but the catalogue has 8"):
        code_cards(table_of(GOOD[:7]), catalog_of(), level=1)


# ------------------------------------------------------------------------------------------------------------ words


def test_words_stand_out_by_their_mean_over_the_code_above_that_over_all_items():
    words = item_words(fields(), ["title", "subtitle"])
    assert set(words.names) == {"rose", "lily", "soap", "plain", "wood", "comb", "horn"}, "stop words are left out"
    dense = words.tfidf.toarray()
    number = prefix_numbers(table_of(GOOD), 1)[0]
    for code, found in enumerate(standing_out(words, number, [0, 1])):
        above = dense[number == code].mean(0) - dense.mean(0)
        expected = [words.names[at] for at in np.argsort(-above, kind="stable") if above[at] > 0]
        assert list(found) == expected


def test_a_word_of_all_items_alike_stands_out_nowhere():
    catalog = catalog_of(fields(title=["same words"] * 8))
    assert [card.words for card in code_cards(table_of(BAD), catalog, 1)] == [(), ()]


@pytest.mark.parametrize(
    ("columns", "names", "line"),
    [
        ({"brand": TITLES}, ["title", "text"], "no text field title or text; there are: brand"),
        ({"title": ["the"] * 8}, ["title"], "hold no words"),
        ({"title": [None] * 8}, ["title"], "hold no words"),
    ],
)
def test_texts_without_words_are_an_error_where_they_were_named_and_cards_do_without(columns, names, line):
    with pytest.raises(InputError, match=line):
        item_words(fields(**columns), names)
    words = {word for card in code_cards(table_of(BAD), catalog_of(fields(**columns)), 1) for word in card.words}
    assert words <= {"rose", "soap", "comb", "lily", "plain", "horn", "wood"} if "brand" in columns else not words


def test_a_catalogue_of_bare_items_has_cards_too():
    card = code_cards(table_of(BAD), catalog_of(pl.DataFrame({"item_id": [f"raw{at}" for at in range(8)]})), 1)[0]
    assert (card.items, card.purity, card.categories, card.words) == (4, None, (), ())
    assert card.top_items == ("raw0", "raw6", "raw4")


def test_an_item_without_a_title_is_named_by_its_raw_id():
    catalog = catalog_of(fields(title=[None, *TITLES[1:]]))
    by_code = {card.prefix: card for card in code_cards(table_of([[at] for at in range(8)], 8), catalog, 1)}
    assert by_code[0,].top_items == ("raw0",)
    assert by_code[0,].words == ()
    assert (by_code[1,].purity, by_code[1,].categories) == (None, ())


def test_a_long_title_is_cut():
    catalog = catalog_of(fields(title=["long " * 40, *TITLES[1:]]))
    card = code_cards(table_of([[at] for at in range(8)], 8), catalog, 1)[0]
    assert len(card.top_items[0]) <= 60
    assert card.top_items[0].endswith("...")


# ---------------------------------------------------------------------------------------------------------- nearest


def test_nearest_codes_are_by_the_cosine_of_mean_embeddings_less_that_of_all_items():
    catalog = catalog_of(vectors=VECTORS)
    cards = {card.prefix: card for card in code_cards(table_of(GOOD), catalog, 2)}
    prefixes = np.array(GOOD)
    means = {}
    for prefix in cards:
        mine = VECTORS[1:][(prefixes == prefix).all(1)].mean(0) - VECTORS[1:].mean(0)
        means[prefix] = mine / np.linalg.norm(mine)
    for prefix, card in cards.items():
        alike = {other: float(means[prefix] @ means[other]) for other in means if other != prefix}
        best = sorted(alike, key=lambda other: -alike[other])[:NEAREST]
        assert [other for other, _ in card.nearest] == best
        assert [value for _, value in card.nearest] == pytest.approx([alike[other] for other in best], abs=1e-5)
    assert cards[2, 0].nearest[0][0] == (2, 1), "soaps lie beside soaps"


def test_what_all_items_have_in_common_brings_no_codes_together():
    number = prefix_numbers(table_of(GOOD), 1)[0]
    far = torch.from_numpy(VECTORS[1:]) + 1000
    assert nearest_codes(far, number, [0])[0][0][1] == pytest.approx(-1, abs=1e-3), "two halves lie on opposite sides"


def test_many_codes_are_compared_in_parts(monkeypatch):
    vectors = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    number = np.arange(40)
    whole = nearest_codes(vectors, number, number)
    monkeypatch.setattr("recsys_lightning.analysis.codes_cards._ROWS", 7)
    parts = nearest_codes(vectors, number, number)
    assert [[code for code, _ in found] for found in parts] == [[code for code, _ in found] for found in whole]


def test_the_only_code_has_no_neighbour():
    card = code_cards(table_of([[1]] * 8), catalog_of(vectors=VECTORS), 1)[0]
    assert card.nearest == ()
