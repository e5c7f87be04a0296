"""Any interaction log kept as a table: CSV or Parquet."""

import csv
import difflib
import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, cast

import polars as pl

from recsys_lightning.data.rejects import RejectLog, excerpt, is_unicode
from recsys_lightning.data.sources.source import RawData, Source
from recsys_lightning.errors import InputError

SUFFIXES = (".parquet", ".csv", ".csv.gz")

MAX_TIME_S = 4_102_444_800  # the year 2100: what lies beyond is another unit or nonsense

MAX_FIELD_CHARACTERS = 2**24

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}
_MICROSECONDS = 1_000_000
_PLACE = "__place"  # where a row stands in its file


class Tabular(Source):
    """Interactions, and optionally items and users, of one table each.

    A file is CSV (``.csv``, ``.csv.gz``: UTF-8, commas, a header line) or Parquet. `RawData` counts whole seconds:
    where the file is finer, its rows are put in order of time first, so that their order within a second is not lost.
    Otherwise file order is kept.

    Args:
        interactions: the file of interactions; relative to the raw folder.
        items: the file of items; null if there are no texts.
        user_column: column of the user, an integer or string.
        item_column: column of the item, in both files, an integer or string.
        timestamp_column: column of the time: a number, an ISO 8601 date or date and time, or a date type. Without time
            zone it counts as UTC. Null: the rows are in order of time.
        text_columns: the columns of `items` that become texts; null means all string columns but the id.
        timestamp_unit: what a time given as number counts.
        max_rejected: the share of unusable rows that is tolerated, in each file.
        name: what to call this data; fit for a folder.
        users: the file of users, with `user_column`; null if nothing is known of them.
        user_feature_columns: the columns of `users` that become features: strings, bools and numbers; in CSV a column
            of numbers alone is numbers. Null means all columns but the id.
    """

    def __init__(
        self,
        interactions: str = "interactions.parquet",
        items: str | None = "items.parquet",
        user_column: str = "user_id",
        item_column: str = "item_id",
        timestamp_column: str | None = "timestamp",
        text_columns: list[str] | None = None,
        timestamp_unit: Literal["s", "ms", "us"] = "s",
        max_rejected: float = 0.001,
        name: str = "tabular",
        users: str | None = None,
        user_feature_columns: list[str] | None = None,
    ) -> None:
        for file in filter(None, (interactions, items, users)):
            if not file.endswith(SUFFIXES):
                raise InputError(f"{file}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
        if not 0 <= max_rejected <= 1:
            raise InputError(f"max_rejected is {max_rejected}; it is a share: give a number from 0 to 1")
        if timestamp_unit not in _PER_SECOND:
            raise InputError(f"timestamp_unit is {timestamp_unit!r}; give one of {', '.join(_PER_SECOND)}")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            raise InputError(f"name is {name!r}; it names a folder: give letters, digits, '.', '_' and '-'")
        columns = [column for column in (user_column, item_column, timestamp_column) if column is not None]
        if len(set(columns)) < len(columns):
            raise InputError(f"columns {', '.join(columns)}: user, item and timestamp must be different columns")
        if user_feature_columns is not None and users is None:
            raise InputError(f"user_feature_columns is {user_feature_columns}, but users names no file to have them")
        self.interactions = interactions
        self.items = items
        self.users = users
        self.user_feature_columns = user_feature_columns
        self.user_column = user_column
        self.item_column = item_column
        self.timestamp_column = timestamp_column
        self.text_columns = text_columns
        self.timestamp_unit = timestamp_unit
        self.max_rejected = max_rejected
        self._name = name

    @property
    def name(self) -> str:
        """The name that was given."""
        return self._name

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments but the name, and those of the users where there is no file of them."""
        # Data without users keep the fingerprint that they had before there were any.
        users = {"users": self.users, "user_feature_columns": self.user_feature_columns} if self.users else {}
        return {
            "interactions": self.interactions,
            "items": self.items,
            "user_column": self.user_column,
            "item_column": self.item_column,
            "timestamp_column": self.timestamp_column,
            "text_columns": self.text_columns,
            "timestamp_unit": self.timestamp_unit,
            "max_rejected": self.max_rejected,
            **users,
        }

    def files(self, raw_dir: Path) -> list[Path]:
        """The file of interactions and, where there are any, of items and of users."""
        return [raw_dir / file for file in (self.interactions, self.items, self.users) if file is not None]

    def read(self, raw_dir: Path) -> RawData:
        """Read the tables.

        Raises:
            InputError: a file is missing or unreadable, a column does not exist or has the wrong type, or more rows
                than `max_rejected` are unusable.
        """
        rejects = RejectLog()
        interactions = self._read_interactions(raw_dir / self.interactions, rejects)
        if self.items is None:
            items = pl.DataFrame(schema={"item_id": pl.String})
        else:
            items = self._read_items(raw_dir / self.items, rejects)
        users = None if self.users is None else self._read_users(raw_dir / self.users, rejects)
        rejects.check(self.max_rejected)
        return RawData(interactions, items, rejects, users)

    def _read_interactions(self, path: Path, rejects: RejectLog) -> pl.DataFrame:
        wanted = [self.user_column, self.item_column]
        if self.timestamp_column is not None:
            wanted.append(self.timestamp_column)
        table = _read_table(path, wanted, rejects)
        if self.timestamp_column is None:
            time = pl.int_range(pl.len(), dtype=pl.Int64) * _MICROSECONDS
            is_time_missing = is_time_unreadable = pl.lit(False)
            is_time_possible = pl.lit(True)
        else:
            column = pl.col(self.timestamp_column)
            time, is_time_unreadable = _microseconds(table, self.timestamp_column, self.timestamp_unit, path)
            is_time_missing = _is_blank(column, table.schema[self.timestamp_column])
            is_time_possible = time.is_between(0, MAX_TIME_S * _MICROSECONDS, closed="none")
        reason = (
            _id_reason(table, self.user_column, "user", path)
            .when(_is_blank(pl.col(self.item_column), _id_type(table, self.item_column, path)))
            .then(pl.lit("no item id"))
            .when(is_time_missing)
            .then(pl.lit("no timestamp"))
            .when(is_time_unreadable)
            .then(pl.lit("unreadable timestamp"))
            .when(is_time_possible)
            .then(None)
            .otherwise(pl.lit("timestamp out of range"))
        )
        kept = _keep_usable(table.with_columns(__time=time), reason, path, rejects)
        if kept.filter(pl.col("__time") % _MICROSECONDS != 0).height:
            kept = kept.sort("__time", maintain_order=True)
        return kept.select(
            user_id=pl.col(self.user_column).cast(pl.String),
            item_id=pl.col(self.item_column).cast(pl.String),
            timestamp=pl.col("__time") // _MICROSECONDS,
        )

    def _read_items(self, path: Path, rejects: RejectLog) -> pl.DataFrame:
        named = [] if self.text_columns is None else self.text_columns
        everything = self.text_columns is None
        table = _read_table(path, [self.item_column, *named], rejects, everything=everything)
        if everything:
            named = [c for c, kind in table.schema.items() if kind == pl.String and c not in (self.item_column, _PLACE)]
        if "item_id" in named:
            raise InputError(f"{path}: text column 'item_id' has the name of the id's column; rename it in the file")
        item = pl.col(self.item_column)
        reason = (
            _id_reason(table, self.item_column, "item", path)
            .when(item.is_first_distinct())
            .then(None)
            .otherwise(pl.lit("duplicate item"))
        )
        kept = _keep_usable(table, reason, path, rejects)
        texts = {column: _text(table.schema[column], column, path) for column in named}
        return kept.select(item_id=item.cast(pl.String), **texts)

    def _read_users(self, path: Path, rejects: RejectLog) -> pl.DataFrame:
        wanted = list(dict.fromkeys([self.user_column, *(self.user_feature_columns or [])]))
        table = _read_table(path, wanted, rejects, everything=self.user_feature_columns is None)
        named = [c for c in table.columns if c not in (self.user_column, _PLACE)]
        if not named:
            raise InputError(f"{path}: there is no column but {self.user_column!r}; add features or set users to null")
        if "user_id" in named:
            raise InputError(f"{path}: feature 'user_id' has the name of the id's column; rename it in the file")
        user = pl.col(self.user_column)
        reason = (
            _id_reason(table, self.user_column, "user", path)
            .when(user.is_first_distinct())
            .then(None)
            .otherwise(pl.lit("duplicate user"))
        )
        kept = _keep_usable(table, reason, path, rejects)
        features = {column: _feature(kept.get_column(column), path) for column in named}
        return kept.select(user_id=user.cast(pl.String), **features)


def _keep_usable(table: pl.DataFrame, reason: pl.Expr, path: Path, rejects: RejectLog) -> pl.DataFrame:
    """The rows without a reason against them; the others are counted in file order."""
    table = table.with_columns(__reason=reason)
    for row in table.filter(pl.col("__reason").is_not_null()).iter_rows(named=True):
        place, why = row.pop(_PLACE), row.pop("__reason")
        row.pop("__time", None)
        rejects.reject(path.name, place, why, excerpt(row))
    kept = table.filter(pl.col("__reason").is_null())
    rejects.keep(path.name, kept.height)
    return kept


def _id_type(table: pl.DataFrame, column: str, path: Path) -> pl.DataType:
    kind = table.schema[column]
    if not (kind.is_integer() or kind in (pl.String, pl.Categorical, pl.Enum)):
        raise InputError(f"{path}: column {column!r} is {kind}; an id is an integer or string, so convert it first")
    return kind


def _id_reason(table: pl.DataFrame, column: str, what: str, path: Path) -> Any:
    # polars has no public type for a when-then chain that goes on, hence Any.
    return pl.when(_is_blank(pl.col(column), _id_type(table, column, path))).then(pl.lit(f"no {what} id"))


def _is_blank(column: pl.Expr, kind: pl.DataType) -> pl.Expr:
    is_null = column.is_null()
    if kind.is_float():
        return is_null | column.is_nan()
    if kind in (pl.String, pl.Categorical, pl.Enum):
        return is_null | (column.cast(pl.String).str.strip_chars() == "")
    return is_null


def _text(kind: pl.DataType, column: str, path: Path) -> pl.Expr:
    """A column as text, null where it is blank."""
    if kind == pl.List(pl.String):
        text = pl.col(column).list.join("; ", ignore_nulls=True)
    elif kind.is_nested() or kind == pl.Binary or kind == pl.Object:
        raise InputError(f"{path}: text column {column!r} is {kind}; convert it to strings first")
    else:
        text = pl.col(column).cast(pl.String)
    text = text.str.strip_chars()
    return pl.when(text != "").then(text)


def _feature(column: pl.Series, path: Path) -> pl.Series:
    """A column of users as numbers or as categories, null where it is blank."""
    kind = column.dtype
    if kind.is_numeric():
        return column.cast(pl.Float64).fill_nan(None)
    if kind not in (pl.String, pl.Categorical, pl.Enum, pl.Boolean):
        raise InputError(
            f"{path}: user feature {column.name!r} is {kind}; convert it to strings or numbers, or name the others in "
            "user_feature_columns"
        )
    text = column.cast(pl.String).str.strip_chars()
    text = text.set(text == "", None)
    if path.name.endswith(".parquet"):
        return text
    number = text.cast(pl.Float64, strict=False)  # CSV has no types
    return number.fill_nan(None) if number.null_count() == text.null_count() else text


def _microseconds(
    table: pl.DataFrame, column: str, unit: Literal["s", "ms", "us"], path: Path
) -> tuple[pl.Expr, pl.Expr]:
    """Time since 1970 (null where out of range), and whether there is a value that cannot be read as a time."""
    kind = table.schema[column]
    value = pl.col(column)
    if isinstance(kind, pl.Date | pl.Datetime):
        return value.cast(pl.Datetime("us")).to_physical(), pl.lit(False)
    if kind.is_integer() or kind.is_float():
        return _scaled(value.cast(pl.Float64), value, unit), _is_fraction(value.cast(pl.Float64))
    if kind == pl.String:
        value = value.str.strip_chars()
        number = value.cast(pl.Float64, strict=False)
        date = _iso_date(value)
        is_unreadable = pl.when(number.is_null()).then(date.is_null()).otherwise(_is_fraction(number))
        return pl.coalesce(_scaled(number, value, unit), date), is_unreadable
    raise InputError(f"{path}: column {column!r} is {kind}; a time is a number, an ISO 8601 string or a date")


def _is_fraction(number: pl.Expr) -> pl.Expr:
    # Infinity is a number out of range, not one that cannot be read.
    return number.is_nan() | (number.is_finite() & (number != number.floor()))


def _scaled(number: pl.Expr, value: pl.Expr, unit: Literal["s", "ms", "us"]) -> pl.Expr:
    """Microseconds of a number in `unit`; null outside the range, where the product might overflow."""
    per_second = _PER_SECOND[unit]
    in_range = number.is_between(0, MAX_TIME_S * per_second, closed="none")
    # "1.4e9" is no integer to the parser, while a float above 2^53 is not exact: integer first.
    whole = pl.coalesce(value.cast(pl.Int64, strict=False), number.cast(pl.Int64, strict=False))
    return pl.when(in_range).then(whole) * (_MICROSECONDS // per_second)


def _iso_date(value: pl.Expr) -> pl.Expr:
    text = value.str.replace("T", " ", literal=True)
    zoned = text.str.replace(r"\s*[zZ]$", "+00:00")
    local = [text.str.to_datetime(form, time_unit="us", strict=False) for form in _LOCAL_FORMS]
    absolute = [
        zoned.str.to_datetime(form, time_unit="us", time_zone="UTC", strict=False).dt.replace_time_zone(None)
        for form in _ZONED_FORMS
    ]
    return pl.coalesce(*local, *absolute).to_physical()


_LOCAL_FORMS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
_ZONED_FORMS = ("%Y-%m-%d %H:%M:%S%.f%:z", "%Y-%m-%d %H:%M%:z")


def _read_table(path: Path, wanted: list[str], rejects: RejectLog, *, everything: bool = False) -> pl.DataFrame:
    """The wanted columns, or all, with a column that says where each row stands in the file."""
    if not path.is_file():
        raise InputError(f"{path} is missing; put it there, or name its folder with --data.raw_dir")
    if path.name.endswith(".parquet"):
        return _read_parquet(path, wanted, rejects, everything)
    return _read_csv(path, wanted, rejects, everything)


def _check_columns(path: Path, wanted: list[str], present: list[str]) -> None:
    for column in wanted:
        if column not in present:
            near = difflib.get_close_matches(column, present, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"{path}: no column {column!r}; {hint}the file has {', '.join(map(repr, present))}")
    doubled = [column for column in dict.fromkeys(present) if present.count(column) > 1]
    if doubled:
        raise InputError(f"{path}: column {doubled[0]!r} occurs twice in the header; rename one")


def _read_parquet(path: Path, wanted: list[str], rejects: RejectLog, everything: bool) -> pl.DataFrame:
    try:
        present = list(pl.read_parquet_schema(path))
        _check_columns(path, wanted, present)
        table = pl.read_parquet(path, columns=present if everything else wanted)
    except (pl.exceptions.PolarsError, OSError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{path} is not a whole Parquet file: {message[:200]}; write or fetch it again") from error
    rejects.read(path.name, table.height)
    return table.with_columns(pl.format("row {}", pl.int_range(1, pl.len() + 1)).alias(_PLACE))


def _read_csv(path: Path, wanted: list[str], rejects: RejectLog, everything: bool) -> pl.DataFrame:
    # polars pads short rows with null and stops at the first long one; the csv module shows us every row as it is.
    rows = _csv_rows(path, rejects)
    header = next(rows, None)
    if header is None:
        raise InputError(f"{path} is empty; its first line must name the columns")
    present = header[1]
    _check_columns(path, wanted, present)
    positions = [(name, present.index(name)) for name in (present if everything else wanted)]
    places: list[str] = []
    columns: list[list[str]] = [[] for _ in positions]
    strings: dict[str, str] = {}  # one object per distinct value: ids repeat millions of times
    for place, row in rows:
        places.append(place)
        for values, (_, position) in zip(columns, positions, strict=True):
            values.append(strings.setdefault(row[position], row[position]))
    data = {name: values for (name, _), values in zip(positions, columns, strict=True)}
    return pl.DataFrame(data | {_PLACE: places}, schema=dict.fromkeys([*data, _PLACE], pl.String))


def _csv_rows(path: Path, rejects: RejectLog) -> Iterator[tuple[str, list[str]]]:
    """First line and fields of the header and of each row that has as many fields as the header."""
    width: int | None = None
    limit = csv.field_size_limit(MAX_FIELD_CHARACTERS)  # the module's own, 128 kB, is short for a product description
    try:
        with _open_text(path) as file:
            reader = csv.reader(file, strict=True)
            while True:
                first = reader.line_num + 1
                try:
                    row = next(reader, None)
                    reason = None if row is None else _csv_reason(row, width)
                except csv.Error as error:
                    row, reason = [], f"broken CSV ({error})"
                if row is None:
                    return
                if width is None:
                    if reason is not None:
                        raise InputError(
                            f"{path}:{first}: {reason} in the header; its first line must name the columns"
                        )
                    width = len(row)
                elif reason is None:
                    rejects.read(path.name)
                else:
                    # Each line that it spans counts: a stray quote that swallows half the file is not one bad row.
                    lines = reader.line_num - first + 1
                    rejects.read(path.name, lines)
                    rejects.reject(path.name, first, reason, excerpt(row), count=lines)
                    continue
                yield str(first), row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file: {error}; write or fetch it again") from error
    finally:
        csv.field_size_limit(limit)


def _csv_reason(row: list[str], width: int | None) -> str | None:
    if not row:
        return "blank line"
    if width is not None and len(row) != width:
        return f"{len(row)} fields instead of {width}"
    if not all(map(is_unicode, row)):
        return "not UTF-8"
    return None


def _open_text(path: Path) -> IO[str]:
    # Undecodable bytes become lone surrogates, by which the row that holds them is found and rejected.
    if path.name.endswith(".gz"):
        return cast(IO[str], gzip.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=""))
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
