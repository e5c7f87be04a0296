import gzip
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys_lightning.data.sources.source import RawData
from recsys_lightning.data.sources.tabular import Tabular
from recsys_lightning.errors import InputError

NOON = 1_400_000_000  # 2014-05-13 16:53:20 UTC


def read_csv(folder: Path, text: str | bytes, **options: Any) -> RawData:
    (folder / "log.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return Tabular("log.csv", None, max_rejected=1.0, **options).read(folder)


def read_times(folder: Path, times: Any, **options: Any) -> list[int]:
    """The timestamps of a Parquet file with these times."""
    values = pl.Series("timestamp", times)
    frame = pl.DataFrame({"user_id": ["u"] * len(values), "item_id": [str(i) for i in range(len(values))]})
    frame.with_columns(values).write_parquet(folder / "log.parquet")
    raw = Tabular("log.parquet", None, **options).read(folder)
    return raw.interactions["timestamp"].to_list()


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_every_kind_of_file_reads_alike(tmp_path: Path, suffix: str) -> None:
    log = pl.DataFrame({"who": [7, 7, 8], "what": ["b", "a,x", "é"], "when": [NOON, NOON + 2, NOON + 1]})
    things = pl.DataFrame({"what": ["a,x", "b"], "title": ["Soap", None], "brand": [" X ", "\n"], "price": [1.5, 2.0]})
    for name, table in (("log", log), ("things", things)):
        if suffix == ".parquet":
            table.write_parquet(tmp_path / f"{name}.parquet")
        else:
            data = table.write_csv().encode()
            (tmp_path / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix == ".csv.gz" else data)
    raw = Tabular(f"log{suffix}", f"things{suffix}", "who", "what", "when", ["title", "brand", "price"]).read(tmp_path)
    assert raw.interactions.schema == {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}
    assert raw.interactions.rows() == [("7", "b", NOON), ("7", "a,x", NOON + 2), ("8", "é", NOON + 1)]
    assert raw.items.rows() == [("a,x", "Soap", "X", "1.5"), ("b", None, None, "2.0")]
    assert set(raw.items.dtypes) == {pl.String}


def test_all_string_columns_but_the_id_are_texts_unless_named(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": ["u"], "item_id": ["i"], "timestamp": [1]}).write_parquet(
        tmp_path / "interactions.parquet"
    )
    pl.DataFrame({"title": ["T"], "item_id": ["i"], "price": [1.5], "tags": [["a", "b"]]}).write_parquet(
        tmp_path / "items.parquet"
    )
    assert Tabular().read(tmp_path).items.rows(named=True) == [{"item_id": "i", "title": "T"}]
    named = Tabular(text_columns=["tags", "price"]).read(tmp_path).items
    assert named.rows(named=True) == [{"item_id": "i", "tags": "a; b", "price": "1.5"}]


def test_without_items_there_are_no_texts(tmp_path: Path) -> None:
    assert read_csv(tmp_path, "user_id,item_id,timestamp\nu,i,5\n").items.schema == {"item_id": pl.String}


def test_without_timestamps_file_order_is_the_time(tmp_path: Path) -> None:
    raw = read_csv(tmp_path, "user_id,item_id\nu,c\nu,\nu,a\nu,b\n", timestamp_column=None)
    assert raw.interactions["item_id"].to_list() == ["c", "a", "b"]
    assert raw.interactions["timestamp"].is_sorted()
    assert raw.interactions["timestamp"].is_unique().all()


@pytest.mark.parametrize(
    "value",
    [
        NOON,
        float(NOON),
        str(NOON),
        f"{NOON}.0",
        "1.4e9",
        " 1400000000 ",
        "2014-05-13 16:53:20",
        "2014-05-13T16:53:20",
        "2014-05-13T16:53:20Z",
        "2014-05-13T18:53:20+02:00",
        "2014-05-13T16:53:20.000Z",
        datetime(2014, 5, 13, 16, 53, 20),
        datetime(2014, 5, 13, 16, 53, 20, tzinfo=UTC),
    ],
    ids=repr,
)
def test_times_of_every_kind_become_seconds(tmp_path: Path, value: Any) -> None:
    assert read_times(tmp_path, [value]) == [NOON]


def test_dates_become_midnight_in_utc(tmp_path: Path) -> None:
    assert read_times(tmp_path, [date(1970, 1, 2)]) == [86_400]
    assert read_times(tmp_path, ["1970-01-02", "1970-01-02 01:00"]) == [86_400, 90_000]
    zoned = pl.Series([datetime(1970, 1, 2)]).dt.replace_time_zone("Etc/GMT-2")  # two hours ahead of UTC
    assert read_times(tmp_path, zoned) == [86_400 - 7_200]


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 1_000), ("us", 1_000_000)])
def test_numbers_count_in_the_given_unit(tmp_path: Path, unit: str, factor: int) -> None:
    assert read_times(tmp_path, [NOON * factor], timestamp_unit=unit) == [NOON]
    assert read_times(tmp_path, [float(NOON * factor)], timestamp_unit=unit) == [NOON]


def test_order_within_a_second_is_not_lost(tmp_path: Path) -> None:
    text = f"user_id,item_id,timestamp\nu,late,{NOON}900\nu,early,{NOON}100\nu,first,{NOON - 1}500\nu,tie,{NOON}900\n"
    raw = read_csv(tmp_path, text, timestamp_unit="ms")
    assert raw.interactions["item_id"].to_list() == ["first", "early", "late", "tie"]
    assert raw.interactions["timestamp"].to_list() == [NOON - 1, NOON, NOON, NOON]


BAD_ROWS = [
    (",i,5", "no user id"),
    ("  ,i,5", "no user id"),
    ("u,,5", "no item id"),
    ("u,i,", "no timestamp"),
    ("u,i,soon", "unreadable timestamp"),
    ("u,i,5.5", "unreadable timestamp"),
    ("u,i,nan", "unreadable timestamp"),
    ("u,i,2014-13-01", "unreadable timestamp"),
    ("u,i,0", "timestamp out of range"),
    ("u,i,-5", "timestamp out of range"),
    ("u,i,inf", "timestamp out of range"),
    ("u,i,1400000000000", "timestamp out of range"),
    ("u,i,99999999999999999999999", "timestamp out of range"),
    ("u,i,1960-01-01", "timestamp out of range"),
    ("", "blank line"),
    ("u,i", "2 fields instead of 3"),
    ("u,i,5,6", "4 fields instead of 3"),
    ('u,"i"x,5', "broken CSV"),
    (b"u,\xff,5", "not UTF-8"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_csv_row_is_counted_with_its_line_and_shifts_nothing(
    tmp_path: Path, row: str | bytes, reason: str
) -> None:
    row = row if isinstance(row, bytes) else row.encode()
    raw = read_csv(tmp_path, b"user_id,item_id,timestamp\na,b,1\n" + row + b"\nc,d,2\n")
    assert raw.interactions.rows() == [("a", "b", 1), ("c", "d", 2)]
    (counted,) = raw.rejects.reasons("log.csv").items()
    assert counted[0].startswith(reason)
    assert counted[1] == 1
    assert raw.rejects.examples("log.csv")[0].startswith(f"log.csv:3: {reason}")
    assert raw.rejects.rows_read() == 3


def test_a_stray_quote_costs_every_line_that_it_swallows(tmp_path: Path) -> None:
    text = 'user_id,item_id,timestamp\na,b,1\n"u,i,5\n' + "c,d,2\n" * 10
    raw = read_csv(tmp_path, text)
    assert raw.interactions.rows() == [("a", "b", 1)]
    assert raw.rejects.rows_rejected() == 11
    assert raw.rejects.rows_read() == 12


def test_a_line_number_counts_lines_within_quotes(tmp_path: Path) -> None:
    raw = read_csv(tmp_path, '\ufeffuser_id,item_id,timestamp\n"a\nb",i,1\nu,,2\n')
    assert raw.rejects.examples("log.csv")[0].startswith("log.csv:4: no item id")
    assert raw.interactions.rows() == [("a\nb", "i", 1)]


def test_bad_parquet_rows_are_counted_with_their_row(tmp_path: Path) -> None:
    pl.DataFrame(
        {"user_id": [1, None, 3, 4], "item_id": ["a", "b", "", "d"], "timestamp": [1.0, 2.0, 3.0, float("nan")]}
    ).write_parquet(tmp_path / "log.parquet")
    raw = Tabular("log.parquet", None, max_rejected=1.0).read(tmp_path)
    assert raw.interactions.rows() == [("1", "a", 1)]
    assert raw.rejects.reasons("log.parquet") == {"no user id": 1, "no item id": 1, "no timestamp": 1}
    assert [example.split(" {")[0] for example in raw.rejects.examples("log.parquet")] == [
        "log.parquet:row 2: no user id",
        "log.parquet:row 3: no item id",
        "log.parquet:row 4: no timestamp",
    ]


def test_the_first_of_two_equal_items_stays(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\nu,i,5\n")
    (tmp_path / "items.csv").write_text("item_id,title\ni,first\ni,second\n,none\nj,\n")
    raw = Tabular("log.csv", "items.csv", max_rejected=1.0).read(tmp_path)
    assert raw.items.rows() == [("i", "first"), ("j", None)]
    assert raw.rejects.reasons("items.csv") == {"duplicate item": 1, "no item id": 1}
    with pytest.raises(InputError, match=r"items\.csv: 2 of 4 rows.*max_rejected"):
        Tabular("log.csv", "items.csv").read(tmp_path)


def test_a_wrong_column_name_is_answered_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no column 'user_id'; did you mean 'userid'\? the file has 'userid', 'item_id'"
    ):
        read_csv(tmp_path, "userid,item_id\nu,i\n")
    pl.DataFrame({"user_id": [1], "item_id": [1]}).write_parquet(tmp_path / "log.parquet")
    with pytest.raises(InputError, match=r"no column 'timestamp'; the file has 'user_id', 'item_id'$"):
        Tabular("log.parquet", None).read(tmp_path)


def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path: Path) -> None:
    cases = {
        "missing.csv": (None, "is missing"),
        "empty.csv": (b"", "is empty"),
        "twice.csv": (b"user_id,item_id,timestamp,timestamp\n", "'timestamp' occurs twice"),
        "cut.csv.gz": (gzip.compress(b"user_id,item_id,timestamp\n" * 50)[:-5], "is not a whole gzip file"),
        "cut.parquet": (b"PAR1 and then nothing", "is not a whole Parquet file"),
    }
    for name, (content, complaint) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=complaint) as refusal:
            Tabular(name, None).read(tmp_path)
        assert name in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_columns_of_the_wrong_type_are_refused(tmp_path: Path) -> None:
    columns = {"user_id": ["u"], "item_id": ["i"], "timestamp": [5]}
    for column, value in (("user_id", 1.5), ("item_id", True), ("timestamp", True)):
        pl.DataFrame(columns | {column: [value]}).write_parquet(tmp_path / "log.parquet")
        with pytest.raises(InputError, match=f"column '{column}' is (Float64|Boolean)"):
            Tabular("log.parquet", None).read(tmp_path)


def test_settings_that_make_no_sense_are_refused_at_birth() -> None:
    for options in (
        {"interactions": "log.tsv"},
        {"max_rejected": 2},
        {"timestamp_unit": "h"},
        {"name": "../up"},
        {"user_column": "item_id"},
        {"users": "users.tsv"},
        {"user_feature_columns": "age"},
    ):
        with pytest.raises(InputError, match=str(next(iter(options.values())))):
            Tabular(**options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- users


def read_users(folder: Path, users: pl.DataFrame | str, **options: Any) -> RawData:
    """The data with this table of users, CSV where it is text."""
    (folder / "log.csv").write_text("who,item_id,timestamp\n7,i,5\n8,i,6\n")
    name = "users.csv" if isinstance(users, str) else "users.parquet"
    if isinstance(users, str):
        (folder / name).write_text(users)
    else:
        users.write_parquet(folder / name)
    return Tabular("log.csv", None, "who", users=name, **options).read(folder)


def test_without_a_file_of_users_nothing_is_known_of_them(tmp_path: Path) -> None:
    assert read_csv(tmp_path, "user_id,item_id,timestamp\nu,i,5\n").users is None


def test_columns_of_users_become_numbers_and_categories(tmp_path: Path) -> None:
    table = pl.DataFrame(
        {
            "who": [7, 8, 9],
            "age": [30, None, 41],
            "height": [1.8, float("nan"), 1.6],
            "country": [" no ", "", None],
            "member": [True, False, None],
            "zip": ["0150", "10115", None],
        }
    )
    raw = read_users(tmp_path, table)
    assert raw.users is not None
    assert raw.users.rows() == [
        ("7", 30.0, 1.8, "no", "true", "0150"),
        ("8", None, None, None, "false", "10115"),
        ("9", 41.0, 1.6, None, None, None),
    ]
    assert raw.users.dtypes == [pl.String, pl.Float64, pl.Float64, pl.String, pl.String, pl.String]
    named = read_users(tmp_path, table, user_feature_columns=["member", "age", "age"]).users
    assert named is not None
    assert named.columns == ["user_id", "member", "age"]
    assert raw.rejects.rows_read("users.parquet") == raw.rejects.rows_kept("users.parquet") == 3


def test_a_csv_column_is_numbers_where_all_its_values_are(tmp_path: Path) -> None:
    raw = read_users(tmp_path, "who,age,height,size\n7,30,1.8,10\n8,,nan,XL\n9,4e1,,\n")
    assert raw.users is not None
    assert raw.users.rows() == [("7", 30.0, 1.8, "10"), ("8", None, None, "XL"), ("9", 40.0, None, None)]


def test_the_first_of_two_rows_of_a_user_stays_and_the_other_is_counted(tmp_path: Path) -> None:
    text = "who,age\n7,30\n7,31\n,32\n8,33\n"
    raw = read_users(tmp_path, text, max_rejected=1.0)
    assert raw.users is not None
    assert raw.users.rows() == [("7", 30.0), ("8", 33.0)]
    assert raw.rejects.reasons("users.csv") == {"duplicate user": 1, "no user id": 1}
    assert raw.rejects.examples("users.csv")[0].startswith("users.csv:3: duplicate user")
    with pytest.raises(InputError, match=r"users\.csv: 2 of 4 rows.*max_rejected"):
        read_users(tmp_path, text)


def test_a_table_of_users_that_cannot_be_used_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no column 'agee'; did you mean 'age'\? the file has 'who', 'age'"):
        read_users(tmp_path, "who,age\n7,30\n", user_feature_columns=["agee"])
    with pytest.raises(InputError, match=r"no column 'who'; the file has 'user', 'age'"):
        read_users(tmp_path, "user,age\n7,30\n")
    with pytest.raises(InputError, match=r"there is no column but 'who'; add features or set users to null"):
        read_users(tmp_path, "who\n7\n")
    with pytest.raises(InputError, match=r"feature 'user_id' has the name of the id's column"):
        read_users(tmp_path, "who,user_id\n7,1\n")
    with pytest.raises(InputError, match=r"user feature 'tags' is List\(String\); convert it to strings or numbers"):
        read_users(tmp_path, pl.DataFrame({"who": [7], "tags": [["a"]]}))
    source = Tabular("log.csv", None, "who", users="gone.parquet")
    assert [path.name for path in source.files(tmp_path)] == ["log.csv", "gone.parquet"]
    with pytest.raises(InputError, match=r"missing .*gone\.parquet; put the files there"):
        source.download(tmp_path)
    with pytest.raises(InputError, match=r"gone\.parquet is missing"):
        source.read(tmp_path)


def test_every_setting_changes_the_fingerprint() -> None:
    changes: dict[str, Any] = {
        "interactions": "x.csv",
        "items": None,
        "user_column": "x",
        "item_column": "x",
        "timestamp_column": None,
        "text_columns": ["x"],
        "timestamp_unit": "ms",
        "max_rejected": 0.5,
    }
    assert changes.keys() == Tabular().settings.keys(), "those of users are not named where there are none"
    for key, value in changes.items():
        assert Tabular(**{key: value}).settings == Tabular().settings | {key: value}
    users = {"users": "users.csv", "user_feature_columns": None}
    assert Tabular(users="users.csv").settings == Tabular().settings | users
    named = Tabular(users="users.csv", user_feature_columns=["age"]).settings
    assert named == Tabular().settings | users | {"user_feature_columns": ["age"]}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(alphabet='ui5,"\n\r \x00é-.', max_size=12), max_size=8))
def test_no_line_is_lost_and_none_crashes_the_reader(tmp_path: Path, lines: list[str]) -> None:
    raw = read_csv(tmp_path, "user_id,item_id,timestamp\n" + "\n".join(lines))
    rejects = raw.rejects
    assert rejects.rows_read() == raw.interactions.height + sum(rejects.reasons("log.csv").values())


@pytest.mark.real_data
def test_books_have_their_published_figures(shared_data: Path) -> None:
    raw = Tabular().read(shared_data / "books-1m")
    assert raw.interactions.height == 517_167
    assert raw.interactions["user_id"].n_unique() == 38_234
    assert raw.items.height == raw.interactions["item_id"].n_unique() == 38_519
    assert raw.items.columns == ["item_id", "title"]
    assert raw.rejects.rows_rejected() == 0
