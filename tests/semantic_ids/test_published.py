"""Published codes: each item gets the codes that the file has for it, or one clear line says why not."""

import io
from pathlib import Path

import polars as pl
import pytest
import torch

from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.published import PublishedCodes

CODES = {"a": [0, 3], "b": [0, 1], "c": [2, 2], "d": [2, 0]}


def table(**columns):
    own = {"item_id": list(CODES), "c0": [c[0] for c in CODES.values()], "c1": [c[1] for c in CODES.values()]}
    return pl.DataFrame(own | columns)


def items(*ids):
    return pl.DataFrame({"item_id": list(ids or CODES)})


def embeddings(num_items=4):
    """Items of one first code lie together."""
    rows = 0.1 * torch.randn(num_items, 3, generator=torch.Generator().manual_seed(0))
    rows[: num_items // 2, 0] += 5
    return rows


@pytest.fixture
def written(tmp_path):
    """Writes a table to a file and gives its path."""

    def write(frame, name="codes.parquet"):
        path = tmp_path / name
        frame.write_parquet(path) if name.endswith("parquet") else frame.write_csv(path)
        return str(path)

    return write


def published(path, **settings):
    return PublishedCodes(3, path, **({"num_levels": 2, "num_codes": 4} | settings))


@pytest.mark.parametrize("name", ["codes.parquet", "codes.csv"])
def test_an_item_has_the_codes_of_its_row_in_any_order(written, name):
    tokenizer = published(written(table(), name)).fit(embeddings(), items())
    assert tokenizer.assign(embeddings(3), items("d", "a", "c")).tolist() == [[2, 0], [0, 3], [2, 2]]


def test_columns_and_one_of_several_tables_are_named_by_key(written):
    other = table(c0=[1, 1, 1, 1])
    frame = pl.concat([table().with_columns(kind=pl.lit("ours")), other.with_columns(kind=pl.lit("theirs"))])
    frame = frame.rename({"item_id": "asin", "c0": "fine", "c1": "coarse"})
    keys = {"code_columns": ["coarse", "fine"], "item_column": "asin", "tokenizer_column": "kind"}
    tokenizer = published(written(frame), tokenizer="theirs", **keys).fit(embeddings(), items())
    assert tokenizer.assign(embeddings(), items()).tolist() == [[3, 1], [1, 1], [2, 1], [0, 1]]
    with pytest.raises(InputError, match="has no tokenizer 'nobody' in kind; it has ours, theirs"):
        published(written(frame), tokenizer="nobody", **keys).fit(embeddings(), items())
    with pytest.raises(InputError, match="more than one row for 4 items, first 'a'"):
        published(written(frame), **keys).fit(embeddings(), items())


def test_a_mapping_says_which_item_is_which(written):
    frame = table(item_id=[10, 11, 12, 13])
    mapping = pl.DataFrame({"number": [13, 12, 11, 10, 9], "asin": ["d", "c", "b", "a", "z"]})
    keys = {"mapping": written(mapping, "mapping.csv")}
    tokenizer = published(written(frame), **keys).fit(embeddings(), items())
    assert tokenizer.assign(embeddings(), items()).tolist() == list(CODES.values())
    short = {"mapping": written(mapping[:2], "short.csv")}
    with pytest.raises(InputError, match=r"short.csv has no raw id for 2 items of .*codes.parquet, first '10'"):
        published(written(frame), **short).fit(embeddings(), items())
    twice = {"mapping": written(pl.concat([mapping, mapping[:1]]), "twice.csv")}
    with pytest.raises(InputError, match=r"twice.csv maps 2 items more than once|maps 1 items more than once"):
        published(written(frame), **twice).fit(embeddings(), items())
    wide = {"mapping": written(mapping.with_columns(more=1), "wide.csv")}
    with pytest.raises(InputError, match="must have two columns"):
        published(written(frame), **wide).fit(embeddings(), items())


def test_numbers_are_those_of_the_catalogue_if_asked(written):
    frame = table(item_id=[4, 3, 2, 1])
    tokenizer = published(written(frame), item_ids="catalogue").fit(embeddings(), items("w", "x", "y", "z"))
    assert tokenizer.assign(embeddings(), items("w", "x", "y", "z")).tolist() == list(CODES.values())[::-1]
    with pytest.raises(InputError, match="numbers 4 items and 3 are asked for"):
        tokenizer.assign(embeddings(3), items("w", "x", "y"))
    with pytest.raises(InputError, match=r"no codes for 4 of 4 items, first 'w'; .* or item_ids: catalogue"):
        published(written(frame)).fit(embeddings(), items("w", "x", "y", "z"))


def test_numbers_in_another_order_than_the_catalogue_are_refused(written):
    numbers = list(range(1, 41))
    first = [0] * 20 + [1] * 20
    right = pl.DataFrame({"item_id": numbers, "c0": first, "c1": 0})
    fields = items(*map(str, numbers))
    published(written(right), item_ids="catalogue").fit(embeddings(40), fields)
    wrong = right.with_columns(c0=pl.Series([0, 1] * 20))
    with pytest.raises(InputError, match=r"random ones would 2.6%: its items are not numbered as the catalogue's"):
        published(written(wrong), item_ids="catalogue").fit(embeddings(40), fields)
    published(written(wrong)).fit(embeddings(40), fields)  # by raw ids there is no doubt


def test_what_codes_stand_for_is_fitted_to_the_embeddings(written):
    tokenizer = published(written(table())).fit(embeddings(), items())
    codes = tokenizer.assign(embeddings(), items())
    torch.testing.assert_close(tokenizer.decode(codes), embeddings(), atol=1e-3, rtol=1e-3)  # 4 items, 4 second codes


def test_a_file_of_the_state_dict_is_enough_without_the_table(written):
    path = written(table())
    first = published(path).fit(embeddings(), items())
    Path(path).unlink()
    second, file = published(path), io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.fitted
    codes = second.assign(embeddings(), items())
    assert codes.tolist() == list(CODES.values())
    assert torch.equal(second.decode(codes), first.decode(codes))


@pytest.mark.parametrize(
    ("frame", "line"),
    [
        (table()[:2], r"no codes for 2 of 4 items, first 'c'"),
        (pl.concat([table(), table()[1:2]]), r"more than one row for 1 items, first 'b'"),
        (table(c1=[3, 4, -1, 0]), r"2 items .* have codes outside 0..3, first 'b' with \[0, 4\]; set num_codes"),
        (table(c1=[3, None, 1, 0]), r"1 items .* have codes outside 0..3, first 'b'"),
        (table(c1=[0.5, 1, 1, 0]), r"column 'c1' .* holds no whole numbers"),
        (table(item_id=["a", None, "c", "d"]), r"1 rows .* have no item in column 'item_id'"),
        (table().drop("c1"), r"has no column 'c1'; it has item_id, c0"),
        (table()[:0], r"holds no items"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_with_count_and_culprit(written, frame, line):
    with pytest.raises(InputError, match=line):
        published(written(frame)).fit(embeddings(), items())


def test_other_mistakes_are_refused(tmp_path, written):
    with pytest.raises(InputError, match=r"nothing.csv does not exist"):
        published(str(tmp_path / "nothing.csv")).fit(embeddings(), items())
    (tmp_path / "codes.txt").touch()
    with pytest.raises(InputError, match="unknown kind of file"):
        published(str(tmp_path / "codes.txt")).fit(embeddings(), items())
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"broken.parquet cannot be read"):
        published(str(tmp_path / "broken.parquet")).fit(embeddings(), items())
    with pytest.raises(InputError, match=r"as many different code_columns as levels, .*'c0', 'c0'"):
        published(written(table()), code_columns=["c0", "c0"])
    with pytest.raises(InputError, match="item_ids must be 'raw' or 'catalogue', got 'name'"):
        published(written(table()), item_ids="name")
    with pytest.raises(RuntimeError, match="before fit"):
        published(written(table())).assign(embeddings(), items())
    with pytest.raises(InputError, match="not by its embedding"):
        published(written(table())).encode(embeddings())


@pytest.mark.real_data
def test_all_ten_public_tables_of_beauty_are_read(shared_data):
    path = str(shared_data / "reference_sids" / "amazon_beauty.parquet")
    frame = pl.read_parquet(path)
    fields = items(*map(str, range(1, 12102)))
    names = frame.get_column("tokenizer").cast(pl.String).unique().to_list()
    assert len(names) == 10
    for name in names:
        tokenizer = PublishedCodes(2, path, 4, 256, tokenizer=name).fit(torch.zeros(12101, 2), fields)
        own = frame.filter(pl.col("tokenizer").cast(pl.String) == name).sort("item_id")
        expected = torch.from_numpy(own.select("c0", "c1", "c2", "c3").to_numpy()).long()
        assert torch.equal(tokenizer.assign(torch.zeros(12101, 2), fields), expected)
