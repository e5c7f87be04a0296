import gzip
import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys_lightning.data.sources.amazon2014 import MAX_LINE_BYTES, Amazon2014
from recsys_lightning.data.sources.source import RawData
from recsys_lightning.errors import InputError

REVIEWS, META = "reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"
GOOD = b'{"reviewerID": "u", "asin": "i", "unixReviewTime": 1400000000}'
ITEM = b"{'asin': 'i', 'title': 'Soap'}"


def write(folder: Path, reviews: list[bytes], meta: list[bytes]) -> None:
    (folder / REVIEWS).write_bytes(gzip.compress(b"".join(line + b"\n" for line in reviews), 1))
    (folder / META).write_bytes(gzip.compress(b"".join(line + b"\n" for line in meta), 1))


def read(folder: Path, reviews: list[bytes] | None = None, meta: list[bytes] | None = None) -> RawData:
    write(folder, [GOOD] if reviews is None else reviews, [ITEM] if meta is None else meta)
    return Amazon2014(max_rejected=1.0).read(folder)


def test_interactions_keep_file_order(tmp_path: Path) -> None:
    lines = [
        b'{"reviewerID": "u2", "asin": "b", "unixReviewTime": 1400000000, "reviewText": "x \\u00e9"}',
        b'{"reviewerID": "u1", "asin": "a", "unixReviewTime": 1300000000}',
        b'{"reviewerID": "u2", "asin": "a", "unixReviewTime": 1400000000}',
    ]
    raw = read(tmp_path, lines)
    assert raw.interactions.schema == {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}
    assert raw.interactions.rows() == [("u2", "b", 1400000000), ("u1", "a", 1300000000), ("u2", "a", 1400000000)]
    assert raw.rejects.rows_rejected() == 0


def test_item_texts_are_plain_and_absent_ones_are_null(tmp_path: Path) -> None:
    full = (
        b"{'asin': 'a', 'title': ' Soap &amp;\\n  Water ', 'brand': 'X', 'price': 12.9, 'description': 'caf\\xe9', "
        b"'categories': [['Beauty', 'Skin &amp; Hair'], ['Gifts'], ['Beauty', 'Skin & Hair'], []], "
        b"'related': {'also_bought': ['b']}, 'salesRank': {'Beauty': 1}}"
    )
    blank = b"{'asin': 'b', 'title': '  ', 'brand': '', 'price': None, 'categories': [['']]}"
    raw = read(tmp_path, meta=[full, blank])
    assert raw.items.columns == ["item_id", "title", "brand", "categories", "price", "description"]
    assert set(raw.items.dtypes) == {pl.String}
    assert raw.items.rows() == [
        ("a", "Soap & Water", "X", "Beauty > Skin & Hair; Gifts", "12.90", "café"),
        ("b", None, None, None, None, None),
    ]


BAD_REVIEWS = [
    (b"", "blank line"),
    (b"   ", "blank line"),
    (b"{", "broken JSON"),
    (GOOD + GOOD, "broken JSON"),
    (b"[" * 100_000, "broken JSON"),
    (b'{"unixReviewTime": ' + b"9" * 5000 + b"}", "broken JSON"),
    (b"[1]", "not an object"),
    (b"null", "not an object"),
    (b'{"reviewerID": "\xff"}', "not UTF-8"),
    (b'{"reviewerID": NaN}', "NaN or infinity"),
    (b'{"reviewerID": -Infinity}', "NaN or infinity"),
    (b'{"asin": "i", "asin": "j"}', "duplicate key"),
    (GOOD[:-1] + b', "helpful": {"a": 1, "a": 2}}', "duplicate key"),
    (b'{"asin": "i", "unixReviewTime": 1400000000}', "no reviewerID"),
    (b'{"reviewerID": "u", "unixReviewTime": 1400000000}', "no asin"),
    (b'{"reviewerID": "u", "asin": "i"}', "no unixReviewTime"),
    (GOOD.replace(b'"u"', b"null"), "reviewerID is not a string"),
    (GOOD.replace(b'"u"', b"7"), "reviewerID is not a string"),
    (GOOD.replace(b'"u"', b'" "'), "empty reviewerID"),
    (GOOD.replace(b'"i"', b'["i"]'), "asin is not a string"),
    (GOOD.replace(b'"i"', b'""'), "empty asin"),
    (GOOD.replace(b'"i"', b'"\\ud800"'), "asin is not valid Unicode"),
    (GOOD.replace(b"1400000000", b"true"), "unixReviewTime is not an integer"),
    (GOOD.replace(b"1400000000", b"null"), "unixReviewTime is not an integer"),
    (GOOD.replace(b"1400000000", b"1400000000.0"), "unixReviewTime is not an integer"),
    (GOOD.replace(b"1400000000", b'"1400000000"'), "unixReviewTime is not an integer"),
    (GOOD.replace(b"1400000000", b"0"), "unixReviewTime out of range"),
    (GOOD.replace(b"1400000000", b"-5"), "unixReviewTime out of range"),
    (GOOD.replace(b"1400000000", b"1400000000000"), "unixReviewTime out of range"),
    (GOOD.replace(b"1400000000", b"9" * 4000), "unixReviewTime out of range"),
    (b'{"reviewerID": "' + b"u" * MAX_LINE_BYTES * 2 + b'"}', "line too long"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_REVIEWS, ids=range(len(BAD_REVIEWS)))
def test_a_bad_review_is_counted_under_its_reason_with_its_line(tmp_path: Path, line: bytes, reason: str) -> None:
    raw = read(tmp_path, [GOOD, line, GOOD])
    assert raw.rejects.reasons(REVIEWS) == {reason: 1}
    assert raw.rejects.examples(REVIEWS)[0].startswith(f"{REVIEWS}:2: {reason}")
    assert len(raw.interactions) == 2
    assert raw.rejects.rows_read(REVIEWS) == 3


BAD_META = [
    (b"", "blank line"),
    (b"{'asin': 'a'", "not a Python literal"),
    (b"{'asin': open('x')}", "not a Python literal"),
    (b"__import__('os').abort()", "not a Python literal"),
    (b"{[]: 1}", "not a Python literal"),
    (b"{'asin': 'a\x00'}", "not a Python literal"),
    (b"(" * 50_000, "not a Python literal"),
    (b"-" * 100_000 + b"1", "not a Python literal"),
    (b"+".join([b"1"] * 20_000), "not a Python literal"),
    (b"a" + b"()" * 50_000, "not a Python literal"),
    (b"['asin']", "not an object"),
    (b"{'asin': 'a', 'asin': 'b'}", "duplicate key"),
    (b"{'asin': '\xff'}", "not UTF-8"),
    (b"{'title': 'x'}", "no asin"),
    (b"{'asin': 7}", "asin is not a string"),
    (b"{'asin': ''}", "empty asin"),
    (b"{'asin': 'a', 'title': ['x']}", "title is not a string"),
    (b"{'asin': 'a', 'price': '3'}", "price is not a number"),
    (b"{'asin': 'a', 'price': True}", "price is not a number"),
    (b"{'asin': 'a', 'price': 1e999}", "price out of range"),
    (b"{'asin': 'a', 'price': -1}", "price out of range"),
    (b"{'asin': 'a', 'categories': ['x']}", "categories is not a list of lists of strings"),
    (b"{'asin': 'a', 'categories': [[1]]}", "categories is not a list of lists of strings"),
    (b"{'asin': 'i', 'title': 'again'}", "duplicate item"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_META, ids=range(len(BAD_META)))
def test_a_bad_item_is_counted_under_its_reason_with_its_line(tmp_path: Path, line: bytes, reason: str) -> None:
    raw = read(tmp_path, meta=[ITEM, line, b"{'asin': 'last'}"])
    assert raw.rejects.reasons(META) == {reason: 1}
    assert raw.rejects.examples(META)[0].startswith(f"{META}:2: {reason}")
    assert raw.items["item_id"].to_list() == ["i", "last"]
    assert raw.items["title"][0] == "Soap"


def test_a_byte_order_mark_belongs_to_the_first_line_only(tmp_path: Path) -> None:
    raw = read(tmp_path, [b"\xef\xbb\xbf" + GOOD, b"\xef\xbb\xbf" + GOOD], [b"\xef\xbb\xbf" + ITEM])
    assert raw.rejects.examples(REVIEWS)[0].startswith(f"{REVIEWS}:2: broken JSON")
    assert raw.rejects.rows_rejected() == 1


def test_a_long_title_comes_through_whole(tmp_path: Path) -> None:
    title = "é" * 500_000
    raw = read(tmp_path, meta=[repr({"asin": "a", "title": title}).encode()])
    assert raw.items["title"][0] == title


def test_half_a_surrogate_pair_in_a_title_costs_only_itself(tmp_path: Path) -> None:
    raw = read(tmp_path, meta=[b"{'asin': 'a', 'title': 'So\\ud800ap'}"])
    assert raw.items["title"][0].replace("\N{REPLACEMENT CHARACTER}", "") == "Soap"


@pytest.mark.parametrize("name", [REVIEWS, META])
@pytest.mark.parametrize("keep", [0, 5, 30, -1])
def test_a_cut_off_file_is_refused_with_its_name(tmp_path: Path, name: str, keep: int) -> None:
    write(tmp_path, [GOOD] * 100, [ITEM])
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep])
    with pytest.raises(InputError, match=rf"{name} .*delete it and download it again"):
        Amazon2014(max_rejected=1.0).read(tmp_path)


def test_a_file_that_is_not_gzip_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [GOOD], [ITEM])
    (tmp_path / REVIEWS).write_bytes(GOOD)
    with pytest.raises(InputError, match="is not a whole gzip file"):
        Amazon2014().read(tmp_path)


def test_the_limit_holds_for_each_file_by_itself(tmp_path: Path) -> None:
    write(tmp_path, [GOOD] * 10_000, [ITEM] * 2)
    with pytest.raises(InputError, match=r"^meta_Beauty.*duplicate item: 1.*meta_Beauty\.json\.gz:2.*max_rejected"):
        Amazon2014(max_rejected=0.1).read(tmp_path)


def test_a_missing_file_is_named_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{REVIEWS} is missing.*--data\.raw_dir"):
        Amazon2014().read(tmp_path)


def test_an_unknown_category_is_answered_without_the_network(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no public category 'Beuty'; did you mean 'Beauty'\?"):
        Amazon2014("Beuty").download(tmp_path)
    with pytest.raises(InputError, match=r"did you mean 'Sports_and_Outdoors'\?"):
        Amazon2014("Sports & Outdoors")
    with pytest.raises(InputError, match="not spelled as in the public files"):
        Amazon2014("../Beauty")


def test_files_that_are_there_are_not_downloaded(tmp_path: Path) -> None:
    write(tmp_path, [GOOD], [ITEM])
    Amazon2014().download(tmp_path)


def test_sources_that_read_differently_differ_in_name_or_settings() -> None:
    source = Amazon2014("Sports_and_Outdoors")
    assert source.name == "amazon2014-sports-and-outdoors"
    assert source.settings == {"category": "Sports_and_Outdoors", "max_rejected": 0.001}
    json.dumps(source.settings)


def mutated(line: bytes) -> st.SearchStrategy[bytes]:
    """The line with a slice replaced by anything."""
    bounds = st.integers(0, len(line))
    return st.builds(
        lambda a, b, middle: line[: min(a, b)] + middle + line[max(a, b) :], bounds, bounds, st.binary(max_size=6)
    )


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
reviews = st.dictionaries(st.sampled_from(["reviewerID", "asin", "unixReviewTime", "x"]), values)
items = st.dictionaries(st.sampled_from(["asin", "title", "brand", "categories", "price", "description"]), values)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(mutated(GOOD) | st.binary() | reviews.map(lambda r: json.dumps(r).encode()), min_size=1, max_size=8),
    st.lists(mutated(ITEM) | st.binary() | items.map(lambda r: repr(r).encode("utf-8", "replace")), min_size=1),
)
def test_no_line_is_lost_and_none_crashes_the_reader(
    tmp_path: Path, review_lines: list[bytes], meta_lines: list[bytes]
) -> None:
    raw = read(tmp_path, review_lines, meta_lines)
    for name, lines, table in ((REVIEWS, review_lines, raw.interactions), (META, meta_lines, raw.items)):
        assert raw.rejects.rows_read(name) == sum(line.count(b"\n") + 1 for line in lines)
        assert raw.rejects.rows_read(name) == table.height + sum(raw.rejects.reasons(name).values())
    assert raw.items["item_id"].is_unique().all()


@pytest.mark.real_data
def test_beauty_has_its_published_figures_and_no_rejects(shared_data: Path) -> None:
    raw = Amazon2014().read(shared_data / "amazon-2014")
    assert raw.interactions.height == 198_502
    assert raw.interactions["user_id"].n_unique() == 22_363
    assert raw.interactions["item_id"].n_unique() == raw.items.height == 12_101
    assert raw.rejects.rows_rejected() == 0
    assert raw.items["title"].null_count() == 0
    assert raw.items.row(0)[:4] == (
        "B00662Z24A",
        "Red Carpet Manicure Pro 45 Starter Kit",
        "Red Carpet Manicure",
        "Beauty > Tools & Accessories > Nail Tools > Sets & Kits",
    )


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ("beauty", "Beauty"),
        ("sports", "Sports_and_Outdoors"),
        ("toys", "Toys_and_Games"),
        ("Beauty", "Beauty"),
        ("mine", "mine"),
    ],
)
def test_a_category_may_be_named_by_its_first_word(given, spelled):
    assert Amazon2014(given).category == spelled
