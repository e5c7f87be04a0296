"""The report on codes: one run's cards, several side by side, and what there is no answer to."""

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.analysis.codes_agreement import next_code_information
from recsys_lightning.analysis.codes_run import CodedRun
from recsys_lightning.analysis.codes_study import CodeStudy, code_study
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.text import ItemEmbeddings
from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.table import SemanticIds

# Eight items: four soaps and three combs; the last has no category.
TITLES = ["Rose Soap", "Lily Soap", "Rose Soap Two", "Plain Soap", "Wood Comb", "Horn Comb", "Rose Comb", "Nothing"]
CATEGORIES = ["Care > Soap", "Care > Soap", "Care > Soap; Gifts", "Care > Soap", *["Care > Comb"] * 3, None]
COUNTS = np.array([0, 5, 9, 1, 7, 2, 8, 3, 4])
GOOD = [2, 2, 2, 2, 0, 0, 0, 0]
BAD = [0, 1, 0, 1, 0, 1, 0, 1]
SEQUENCES = [np.array([1, 2, 5]), np.array([6, 7])]  # soaps, a comb; combs
VECTORS = np.array([[0, 0], *[[9, 1]] * 4, *[[1, 9]] * 4], dtype=np.float32)


def silent(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def fields(**columns: list) -> pl.DataFrame:
    ids = {"item_id": [f"raw{at}" for at in range(8)]}
    return pl.DataFrame(ids | (columns or {"title": TITLES, "categories": CATEGORIES}))


def run_of(name: str, *levels: list[int], table: pl.DataFrame | None = None, sequences=SEQUENCES) -> CodedRun:
    """A run with these codes, a list a level; with two levels of 0s behind it where one is given."""
    zeros = [[0] * 8] * (2 if len(levels) == 1 else 0)
    codes = F.pad(torch.tensor([*levels, *zeros]).T, (0, 0, 1, 0))
    catalog = Catalog(fields() if table is None else table, COUNTS, ItemEmbeddings(VECTORS, "f" * 64, "by hand"))
    of = SemanticIds(codes.contiguous(), 4, "f" * 64, "by hand")
    return CodedRun(name, of, catalog, sequences, {}, "best.ckpt", torch.device("cpu"))


def studied(*runs: CodedRun, **asked):
    return code_study(runs, CodeStudy(**asked), silent)


def table_of(found, title: str) -> list[list[str]]:
    return next(table.body for table in found.tables if table.title.startswith(title))


def csv_of(content: bytes) -> list[dict]:
    return pl.read_csv(content).to_dicts()


def test_one_run_has_its_use_its_agreement_and_its_cards():
    found = studied(run_of("runs/a", GOOD), levels=(1, 2))
    assert [table.title for table in found.tables] == [
        "Use of the codes",
        "Agreement with the categories (`categories`)",
        "Codes of the next item",
        "Codes of level 1 of `runs/a`",
        "Codes of level 2 of `runs/a`",
    ]
    assert [row[1:5] for row in found.tables[0].body] == [
        ["1", "4", "2", "2.0"],
        ["2", "16", "2", "2.0"],
        ["3 (whole ID)", "64", "2", "2.0"],
    ]
    first = found.tables[1].body[0]
    assert first[1:7] == ["1", "2", "7", "2", "0.571", first[6]]
    assert first[6].startswith("1.000 ("), "all codes are pure"
    assert first[-1] == "1.000"
    assert "Level 1 of `categories` is `Care` wherever there is one: there is nothing to agree with." in found.remarks
    assert "Items without a category at level 2 of `categories`, left out there: 1." in found.remarks
    cards = found.tables[3].body
    assert [row[0] for row in cards] == ["0", "2"]
    assert "Comb 100%" in cards[0]
    assert cards[0][-1] == "2 (-1.00)", "the nearest code, with the cosine"
    assert [row[0] for row in found.tables[4].body] == ["0-0", "2-0"]
    assert set(found.files) == {".csv", "-measures.csv"}
    assert found.pictures[".png"].startswith(b"\x89PNG")


def test_next_items_are_counted_level_by_level():
    row = table_of(studied(run_of("runs/a", GOOD)), "Codes of the next item")[0]
    # Pairs 1-2 and 6-7 stay in their code, 2-5 does not; five interactions, two with soaps.
    assert row[1:5] == ["1", f"{2 / 3:.2%}", f"{(2 / 5) ** 2 + (3 / 5) ** 2:.2%}", f"{(2 / 3) / 0.52:.1f}"]
    run = run_of("runs/a", [0, 1, 1, 0, 2, 2, 1, 3])
    measures = csv_of(studied(run).files["-measures.csv"])
    assert measures[0]["pairs"] == 3
    assert measures[0]["next_share"] == 0
    assert measures[0]["next_nmi"] == pytest.approx(next_code_information(run.table.codes[:, 0].numpy(), SEQUENCES))


def test_two_runs_stand_side_by_side():
    after = [1, 1, 1, 3, 0, 0, 0, 0]
    found = studied(run_of("runs/a", GOOD), run_of("runs/b", after))
    assert table_of(found, "Changes")[0] == ["runs/b", "50.0%", "12.5%"]
    pairs = table_of(found, "Level-1 codes of `runs/a` and their counterparts in `runs/b`")
    assert [(row[0], row[5], row[6]) for row in pairs] == [("0", "4", "0"), ("2", "3", "1"), ("-", "0", "3")]
    assert csv_of(found.files["-changes.csv"])[1]["items_in_both"] == 3
    between = csv_of(found.files["-between.csv"])
    assert [(row["run"], row["level"], row["other"], row["other_level"]) for row in between] == [
        ("runs/a", level, "runs/b", level) for level in (1, 2, 3)
    ]
    assert found.pictures[".png"].startswith(b"\x89PNG")
    assert studied(run_of("runs/a", GOOD), run_of("runs/b", after)).pictures == found.pictures, "the same bytes again"


def test_every_two_of_several_runs_are_compared_by_their_whole_ids_too():
    three = run_of("runs/a", GOOD), run_of("runs/b", GOOD, BAD), run_of("runs/c", BAD)
    between = csv_of(studied(*three).files["-between.csv"])
    assert [(row["run"][-1], row["level"], row["other"][-1], row["other_level"]) for row in between] == [
        *[("a", level, "b", min(level, 2)) for level in (1, 2, 3)],
        *[("a", level, "c", level) for level in (1, 2, 3)],
        *[("b", level, "c", other) for level, other in ((1, 1), (2, 2), (2, 3))],
    ]
    assert between[0]["nmi"] == pytest.approx(1), "the same codes"
    assert between[3]["nmi"] == pytest.approx(0, abs=1e-9), "codes that say nothing of one another"


def test_a_catalogue_without_categories_has_words_only_and_says_so():
    plain = fields(title=TITLES)
    found = studied(run_of("runs/a", GOOD, table=plain), run_of("runs/b", BAD, table=plain))
    assert not any("categories" in table.title for table in found.tables)
    assert "The catalogue has no field `categories`: codes are described by words and items only." in found.remarks
    assert found.pictures[".png"].startswith(b"\x89PNG")
    measures = csv_of(found.files["-measures.csv"])
    assert [(row["run"], row["used"], row["purity"]) for row in measures[::3]] == [
        ("runs/a", 2, None),
        ("runs/b", 2, None),
    ]


def test_a_catalogue_of_bare_items_can_be_studied_too():
    bare = pl.DataFrame({"item_id": [f"raw{at}" for at in range(8)]})
    found = studied(run_of("runs/a", GOOD, table=bare))
    assert found.settings["words of"] == "nothing"
    assert table_of(found, "Codes of level 1")[0][6] == "raw5; raw7; raw6"
    with pytest.raises(InputError, match="no text field title"):
        studied(run_of("runs/a", GOOD, table=bare), text_fields=("title",))


def test_another_field_and_level_can_be_named():
    table = fields().with_columns(pl.Series("kind", ["s"] * 4 + ["c"] * 4))
    found = studied(run_of("runs/a", GOOD, table=table), field="kind", levels=(1,))
    assert found.tables[1].body[0][:5] == ["runs/a", "1", "1", "8", "2"]
    assert found.settings["categories"] == "kind, levels 1"


def test_the_largest_codes_are_shown_and_all_are_in_the_file():
    found = studied(run_of("runs/a", [0, 0, 0, 1, 1, 2, 2, 3]), shown=2)
    assert [row[0] for row in table_of(found, "Codes of level 1")] == ["0", "1"]
    assert "Of each level the 2 largest codes are shown, of up to 4; the CSV file has all cards." in found.remarks
    rows = csv_of(found.files[".csv"])
    assert [row["code"] for row in rows if row["level"] == 1] == ["0", "1", "2", "3"]


def test_small_codes_of_level_two_have_no_card_and_that_is_said():
    run = run_of("runs/a", [0, 0, 0, 1, 1, 1, 2, 3], [0, 0, 1, 0, 0, 0, 0, 0], [0] * 8)
    found = studied(run)
    assert [row[0] for row in table_of(found, "Codes of level 1")] == ["0", "1", "2", "3"]
    assert [row[0] for row in table_of(found, "Codes of level 2")] == ["1-0", "0-0"]
    assert "Without a card, since they have fewer than 2 items: 3 codes of level 2 of `runs/a`." in found.remarks
    assert len(table_of(studied(run, min_items=1), "Codes of level 2")) == 5
    assert len(table_of(studied(run, min_items=3), "Codes of level 2")) == 1


def test_the_levels_that_get_cards_can_be_named():
    run = run_of("runs/a", GOOD, BAD)
    assert {row["level"] for row in csv_of(studied(run, code_levels=(2,)).files[".csv"])} == {2}
    found = studied(run, run_of("runs/b", GOOD, BAD, GOOD), code_levels=(3, 2))
    assert [table.title for table in found.tables[-3:]] == [
        "Codes of level 2 (whole ID) of `runs/a`",
        "Codes of level 2 of `runs/b`",
        "Codes of level 3 (whole ID) of `runs/b`",
    ]
    assert found.pictures[".png"].startswith(b"\x89PNG")
    with pytest.raises(InputError, match="--code_levels 3: the runs have codes of levels 1 to 2"):
        studied(run, code_levels=(3,))


def test_the_seed_is_of_what_chance_reaches_and_of_nothing_else():
    zero, one = (csv_of(studied(run_of("runs/a", BAD), seed=seed).files["-measures.csv"])[1] for seed in (0, 1))
    assert zero["nmi"] == one["nmi"]
    assert zero["chance_nmi"] != one["chance_nmi"]


def test_without_a_next_item_there_is_no_table_of_it():
    found = studied(run_of("runs/a", GOOD, sequences=[np.array([1]), np.array([2])]))
    assert not any(table.title == "Codes of the next item" for table in found.tables)
    assert "`runs/a`: no user has two training interactions, so that no item has a next one." in found.remarks


def test_runs_that_cannot_be_compared_are_refused():
    other = fields().with_columns(item_id=pl.lit("z") + pl.col("item_id"))
    with pytest.raises(InputError, match="runs/b and runs/a are on different items"):
        studied(run_of("runs/a", GOOD), run_of("runs/b", GOOD, table=other))
    with pytest.raises(InputError, match="--levels 1 1: need different levels"):
        studied(run_of("runs/a", GOOD), levels=(1, 1))
    with pytest.raises(InputError, match="--code_levels 0: need different levels from 1"):
        studied(run_of("runs/a", GOOD), code_levels=(0,))
