"""What level-1 codes stand for: measures by hand, cards of a catalogue that a person can picture, and the report."""

import math
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from recsys_lightning.analysis.study_run import StudiedRun
from recsys_lightning.analysis.study_sparc_cards import code_cards, item_words, standing_out
from recsys_lightning.analysis.study_sparc_codes import agreement, category_labels, change
from recsys_lightning.analysis.study_sparc_codes_report import code_study
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.trie import PrefixTrie

# Eight items: four soaps and three combs; the last has no category.
TITLES = ["Rose Soap", "Lily Soap", "Rose Soap Two", "Plain Soap", "Wood Comb", "Horn Comb", "Rose Comb", "Nothing"]
CATEGORIES = ["Care > Soap", "Care > Soap", "Care > Soap; Gifts", "Care > Soap", *["Care > Comb"] * 3, None]
COUNTS = np.array([0, 5, 9, 1, 7, 2, 8, 3, 4])
GOOD = np.array([2, 2, 2, 2, 0, 0, 0, 0])
BAD = np.array([0, 1, 0, 1, 0, 1, 0, 1])


def silent(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def fields(**columns: list) -> pl.DataFrame:
    ids = {"item_id": [f"raw{at}" for at in range(8)]}
    return pl.DataFrame(ids | (columns or {"title": TITLES, "categories": CATEGORIES}))


def run_of(name: str, level1: np.ndarray, table: pl.DataFrame | None = None, num_codes: int = 4) -> StudiedRun:
    """A run whose model gives these codes, and 0 at level 2."""
    codes = torch.zeros(len(level1) + 1, 2, dtype=torch.long)
    codes[1:, 0] = torch.as_tensor(level1)
    trie = PrefixTrie(
        SemanticIds(codes=codes, num_codes=num_codes, embeddings_fingerprint="f" * 64, tokenizer="by hand")
    )
    catalog = Catalog(fields() if table is None else table, COUNTS)
    data, model = SimpleNamespace(catalog=catalog), SimpleNamespace(prefix_trie=trie)
    return StudiedRun(name, model, data, {}, "best.ckpt", torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------- measures


def test_the_category_of_a_level_is_that_of_the_first_path():
    table = pl.DataFrame({"item_id": ["a", "b", "c", "d"], "kind": ["A > B; C > D", "C", None, ""]})
    assert category_labels(table, "kind", 1) == ["A", "C", None, None]
    assert category_labels(table, "kind", 2) == ["B", None, None, None]
    assert category_labels(table, "kind", 3) == [None] * 4
    with pytest.raises(InputError, match="no text field 'knid'; there are: kind"):
        category_labels(table, "knid", 1)


def entropy(counts: list[int]) -> float:
    return -sum(n / sum(counts) * math.log(n / sum(counts)) for n in counts if n)


def test_agreement_is_the_formulas_of_its_docstring_over_the_items_with_a_category():
    codes = np.array([0, 0, 0, 3, 3, 3, 3, 1])
    labels = ["x", "x", "y", "y", "y", "z", "z", None]
    found = agreement(codes, labels)
    # Code 0 holds x x y, code 3 holds y y z z.
    assert (found.items, found.categories) == (7, 3)
    assert found.largest == pytest.approx(3 / 7)
    assert found.purity == pytest.approx((2 + 2) / 7)
    of_codes, of_labels = entropy([3, 4]), entropy([2, 3, 2])
    rest = 3 / 7 * entropy([2, 1]) + 4 / 7 * entropy([2, 2])  # H(category | code)
    assert found.homogeneity == pytest.approx(1 - rest / of_labels)
    assert found.nmi == pytest.approx((of_labels - rest) / ((of_codes + of_labels) / 2))


def test_codes_that_are_the_categories_agree_wholly_and_random_ones_not_beyond_chance():
    labels = [f"c{at % 4}" for at in range(400)]
    same = agreement(np.arange(400) % 4, labels)
    assert (same.purity, same.nmi, same.homogeneity) == pytest.approx((1, 1, 1))
    drawn = agreement(np.random.default_rng(0).integers(0, 64, 400), labels)
    assert drawn.nmi > 0.05, "many codes share information with anything"
    assert drawn.ami == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("labels", [["x"] * 8, [None] * 8, ["x", None] * 4])
def test_without_two_categories_there_is_nothing_to_agree_with(labels):
    assert agreement(GOOD, labels) is None


def test_a_coding_under_other_numbers_has_changed_its_numbers_only():
    before = np.array([0, 0, 1, 1, 2, 2])
    found = change(before, np.array([2, 2, 0, 0, 1, 1]))
    assert (found.nmi, found.ami, found.moved) == pytest.approx((1, 1, 0))
    assert found.renumbered == 1
    assert sorted(found.pairs) == [(0, 2, 2), (1, 0, 2), (2, 1, 2)]


def test_moved_items_are_those_outside_the_counterpart_of_their_code():
    before = np.array([0, 0, 0, 0, 1, 1, 1])
    after = np.array([5, 5, 5, 1, 1, 1, 0])  # 0 -> 5 keeps three, 1 -> 1 keeps two
    found = change(before, after)
    assert found.moved == pytest.approx(2 / 7)
    assert found.renumbered == pytest.approx(5 / 7)
    assert found.pairs == ((0, 5, 3), (1, 1, 2))


def test_counterparts_are_matched_as_a_whole_and_not_one_after_the_other():
    # Code 0 shares most with 0, but then code 1 would be left with nothing: 3 + 3 items stay rather than 4.
    before = np.array([0] * 7 + [1] * 3)
    after = np.array([0] * 4 + [1] * 3 + [0] * 3)
    assert change(before, after).moved == pytest.approx(4 / 10)


# ------------------------------------------------------------------------------------------------------------- cards


def test_words_stand_out_by_their_mean_over_the_code_above_that_over_all_items():
    words = item_words(fields(), ["title", "subtitle"])
    assert set(words.names) == {"rose", "lily", "soap", "plain", "wood", "comb", "horn"}, "stop words are left out"
    dense = words.tfidf.toarray()
    scores = standing_out(words, GOOD, 4)
    for code in (0, 2):
        expected = dense[np.flatnonzero(code == GOOD)].mean(0) - dense.mean(0)
        np.testing.assert_allclose(scores[code], expected, atol=1e-12)
    assert not scores[[1, 3]].any(), "no item has them"


def test_a_card_says_what_is_in_its_code():
    catalog = Catalog(fields(), COUNTS)
    words = item_words(catalog.fields, ["title"])
    cards = code_cards(catalog, GOOD, 4, words, category_labels(catalog.fields, "categories", 2))
    assert [(card.code, card.items) for card in cards] == [(0, 4), (2, 4)]
    comb, soap = cards
    assert soap.words[0] == "soap"
    assert comb.words[0] == "comb"
    assert soap.top_items == ("Lily Soap", "Plain Soap", "Rose Soap"), "the most met in training first"
    assert soap.interactions == pytest.approx((5 + 9 + 1 + 7) / 39)
    assert comb.categories == (("Comb", 1.0),)
    assert comb.purity == 1, "the item without a category does not count"
    mixed = code_cards(catalog, BAD, 4, words, category_labels(catalog.fields, "categories", 2))
    # Code 0: Rose Soap, Rose Soap Two, Wood Comb, Rose Comb. Code 1: Lily Soap, Plain Soap, Horn Comb, Nothing.
    assert [card.purity for card in mixed] == pytest.approx([1 / 2, 2 / 3])
    assert mixed[0].categories == (("Comb", 0.5), ("Soap", 0.5))


def test_an_item_without_a_title_is_named_by_its_raw_id():
    catalog = Catalog(fields(title=[None, *TITLES[1:]]), COUNTS)
    cards = code_cards(catalog, np.arange(8), 8, item_words(catalog.fields, ["title"]), None)
    by_code = {card.code: card for card in cards}
    assert by_code[0].top_items == ("raw0",)
    assert by_code[0].words == ()
    assert (by_code[1].purity, by_code[1].categories) == (None, ())


def test_a_long_title_is_cut():
    catalog = Catalog(fields(title=["long " * 40, *TITLES[1:]]), COUNTS)
    card = code_cards(catalog, np.arange(8), 8, item_words(catalog.fields, ["title"]), None)[0]
    assert len(card.top_items[0]) <= 60
    assert card.top_items[0].endswith("...")


@pytest.mark.parametrize(
    ("columns", "names", "line"),
    [
        ({"brand": TITLES}, ["title", "text"], "no text field title or text; there are: brand"),
        ({"title": ["the"] * 8}, ["title"], "hold no words"),
        ({"title": [None] * 8}, ["title"], "hold no words"),
    ],
)
def test_texts_without_words_are_an_error(columns, names, line):
    with pytest.raises(InputError, match=line):
        item_words(fields(**columns), names)


# ------------------------------------------------------------------------------------------------------------ report


def studied(*runs: StudiedRun, field: str | None = None, levels=(1, 2), texts=("title",), shown: int = 64):
    return code_study(runs, field, levels, texts, shown, silent)


def csv_of(content: bytes) -> list[dict]:
    return pl.read_csv(content).to_dicts()


def test_one_run_has_its_cards_and_what_a_level_of_one_category_cannot_tell():
    found = studied(run_of("runs/a", GOOD))
    use, agreements, cards = found.tables
    assert use.body == [["runs/a", "4", "2", "2.0", "4", "4", "4"]]
    assert [row[:2] for row in agreements.body] == [["runs/a", "1"], ["runs/a", "2"]]
    assert set(agreements.body[0][2:]) == {"-"}
    assert agreements.body[1][2:] == ["7", "2", "0.5714", "1.0000", "1.0000", "1.0000", "1.0000"]
    assert "Level 1 of `categories` is `Care` wherever there is one: there is nothing to agree with." in found.remarks
    assert "Items without a category at level 2 of `categories`, left out there: 1." in found.remarks
    assert [row[0] for row in cards.body] == ["0", "2"]
    assert "Comb 100%" in cards.body[0]
    rows = csv_of(found.files[".csv"])
    assert [(row["code"], row["purity"]) for row in rows] == [(0, 1.0), (2, 1.0)]
    assert "-changes.csv" not in found.files
    assert found.pictures[".png"].startswith(b"\x89PNG")


def test_two_runs_stand_side_by_side():
    after = np.array([1, 1, 1, 3, 0, 0, 0, 0])
    found = studied(run_of("runs/a", GOOD), run_of("runs/b", after))
    changes, pairs = found.tables[2:]
    assert changes.body[0][0] == "runs/b"
    assert changes.body[0][3:] == ["50.0%", "12.5%"]
    assert [(row[0], row[5], row[6]) for row in pairs.body] == [("0", "4", "0"), ("2", "3", "1"), ("-", "0", "3")]
    assert csv_of(found.files["-changes.csv"])[1]["items_in_both"] == 3
    assert found.pictures[".png"].startswith(b"\x89PNG")
    assert studied(run_of("runs/a", GOOD), run_of("runs/b", after)).pictures == found.pictures, "the same bytes again"


def test_a_catalogue_without_categories_has_words_only_and_says_so():
    plain = fields(title=TITLES)
    found = studied(run_of("runs/a", GOOD, plain), run_of("runs/b", BAD, plain))
    assert not any("Agreement" in table.title for table in found.tables)
    assert "The catalogue has no field `categories`: codes are described by words and items only." in found.remarks
    assert found.pictures[".png"].startswith(b"\x89PNG")
    measures = csv_of(found.files["-measures.csv"])
    assert [(row["run"], row["used"], row["purity"]) for row in measures] == [("runs/a", 2, None), ("runs/b", 2, None)]


def test_another_field_and_level_can_be_named():
    table = fields().with_columns(pl.Series("kind", ["s"] * 4 + ["c"] * 4))
    found = studied(run_of("runs/a", GOOD, table), field="kind", levels=(1,))
    assert [row[:4] for row in found.tables[1].body] == [["runs/a", "1", "8", "2"]]
    assert found.settings["categories"] == "kind, levels 1"


def test_the_largest_codes_are_shown_and_all_are_in_the_file():
    found = studied(run_of("runs/a", np.array([0, 0, 0, 1, 1, 2, 2, 3])), shown=2)
    assert [row[0] for row in found.tables[-1].body] == ["0", "1"]
    assert "The 2 largest of 4 codes are shown; the CSV file has all." in found.remarks
    assert len(csv_of(found.files[".csv"])) == 4


def test_runs_that_cannot_be_compared_are_refused():
    other = fields().with_columns(item_id=pl.lit("z") + pl.col("item_id"))
    with pytest.raises(InputError, match="runs/b and runs/a are on different items"):
        studied(run_of("runs/a", GOOD), run_of("runs/b", GOOD, other))
    bare = StudiedRun("runs/c", SimpleNamespace(prefix_trie=None), run_of("", GOOD).data, {}, "", torch.device("cpu"))
    with pytest.raises(InputError, match="runs/c has no semantic IDs"):
        studied(bare)
    with pytest.raises(InputError, match="--levels 1 1: need different levels"):
        studied(run_of("runs/a", GOOD), levels=(1, 1))
