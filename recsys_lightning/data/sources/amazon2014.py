"""Amazon product reviews of 2014 (5-core) and product metadata, in the raw public format.

He & McAuley, "Ups and Downs" (WWW 2016); McAuley et al., "Image-based Recommendations" (SIGIR 2015).
"""

import ast
import codecs
import difflib
import gzip
import html
import io
import json
import math
import re
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.progress import Progress

from recsys_lightning.data.download import download
from recsys_lightning.data.rejects import RejectLog, excerpt, is_unicode
from recsys_lightning.data.sources.source import RawData, Source
from recsys_lightning.errors import InputError

BASE_URL = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"

CATEGORIES = (
    "Amazon_Instant_Video",
    "Apps_for_Android",
    "Automotive",
    "Baby",
    "Beauty",
    "Books",
    "CDs_and_Vinyl",
    "Cell_Phones_and_Accessories",
    "Clothing_Shoes_and_Jewelry",
    "Digital_Music",
    "Electronics",
    "Grocery_and_Gourmet_Food",
    "Health_and_Personal_Care",
    "Home_and_Kitchen",
    "Kindle_Store",
    "Movies_and_TV",
    "Musical_Instruments",
    "Office_Products",
    "Patio_Lawn_and_Garden",
    "Pet_Supplies",
    "Sports_and_Outdoors",
    "Tools_and_Home_Improvement",
    "Toys_and_Games",
    "Video_Games",
)

TEXT_COLUMNS = ("title", "brand", "categories", "price", "description")

# Real lines stay below 200 kB; the Python parser needs some 500 bytes of memory for each byte of a hostile line.
MAX_LINE_BYTES = 2 * 2**20

MAX_TIME_S = 4_102_444_800  # the year 2100: what lies beyond is milliseconds or nonsense

_LINES_PER_UPDATE = 4096


class Amazon2014(Source):
    """One category of the Amazon reviews of 2014: ``reviews_<category>_5.json.gz`` and ``meta_<category>.json.gz``.

    Args:
        category: the category as the public files spell it, such as ``Sports_and_Outdoors``, or its first word in small
            letters, such as ``sports``, where that names only one.
        max_rejected: the share of unusable lines that is tolerated, in each file.
    """

    def __init__(self, category: str = "Beauty", max_rejected: float = 0.001) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_]+", category):
            raise InputError(f"category {category!r} is not spelled as in the public files; {_suggestion(category)}")
        if not 0 <= max_rejected <= 1:
            raise InputError(f"max_rejected is {max_rejected}; it is a share: give a number from 0 to 1")
        self.category = _spelled(category)
        self.max_rejected = max_rejected

    @property
    def name(self) -> str:
        """``amazon2014-`` and the category in small letters."""
        return f"amazon2014-{self.category.lower().replace('_', '-')}"

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"category": self.category, "max_rejected": self.max_rejected}

    def files(self, raw_dir: Path) -> list[Path]:
        """The review file and the metadata file."""
        return [raw_dir / f"reviews_{self.category}_5.json.gz", raw_dir / f"meta_{self.category}.json.gz"]

    def download(self, raw_dir: Path) -> None:
        """Fetch the files that are missing.

        Raises:
            InputError: there is no such category, or the server does not deliver.
        """
        for path in self.files(raw_dir):
            if not path.exists() and self.category not in CATEGORIES:
                raise InputError(
                    f"{path} does not exist and there is no public category {self.category!r}; "
                    f"{_suggestion(self.category)}, or put the file there"
                )
            download(BASE_URL + path.name, path)

    def read(self, raw_dir: Path) -> RawData:
        """Read both files, line by line.

        Raises:
            InputError: a file is missing, cut off, empty, or has more unusable lines than `max_rejected` allows.
        """
        reviews_path, meta_path = self.files(raw_dir)
        rejects = RejectLog()
        interactions = _read_reviews(reviews_path, rejects)
        items = _read_meta(meta_path, rejects)
        rejects.check(self.max_rejected)
        return RawData(interactions, items, rejects)


class _RejectedError(Exception):
    """A line that cannot be used: the reason it is counted under, and what it held."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def _spelled(category: str) -> str:
    """The public spelling of a category named by its first word; any other name as it is."""
    named = [known for known in CATEGORIES if category == known.lower() or known.lower().startswith(f"{category}_")]
    return named[0] if len(named) == 1 else category


def _suggestion(category: str) -> str:
    spelled = re.sub(r"\W+", "_", category.replace("&", "and"))
    near = difflib.get_close_matches(spelled, CATEGORIES, n=1, cutoff=0.5)
    known = f"the public categories are {', '.join(CATEGORIES)}"
    return f"did you mean {near[0]!r}?" if near else known


def _read_reviews(path: Path, rejects: RejectLog) -> pl.DataFrame:
    users: list[str] = []
    items: list[str] = []
    times: list[int] = []
    ids: dict[str, str] = {}  # one string object per id: the largest categories have millions of rows
    for number, line in _lines(path):
        rejects.read(path.name)
        try:
            user, item, timestamp = parse_review(line)
        except _RejectedError as error:
            rejects.reject(path.name, number, error.reason, error.detail)
            continue
        users.append(ids.setdefault(user, user))
        items.append(ids.setdefault(item, item))
        times.append(timestamp)
    _refuse_empty(path, rejects)
    frame = pl.DataFrame(
        {"user_id": users, "item_id": items, "timestamp": times},
        schema={"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64},
    )
    rejects.keep(path.name, frame.height)
    return frame


def _read_meta(path: Path, rejects: RejectLog) -> pl.DataFrame:
    rows: dict[str, tuple[str | None, ...]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes such as '\d' in titles make the parser warn
        for number, line in _lines(path):
            rejects.read(path.name)
            try:
                item, texts = parse_meta(line)
                if item in rows:
                    raise _RejectedError("duplicate item", item)
            except _RejectedError as error:
                rejects.reject(path.name, number, error.reason, error.detail)
                continue
            rows[item] = texts
    _refuse_empty(path, rejects)
    columns = dict(zip(TEXT_COLUMNS, zip(*rows.values(), strict=True), strict=True)) if rows else {}
    frame = pl.DataFrame(
        {"item_id": list(rows)} | {name: list(columns.get(name, ())) for name in TEXT_COLUMNS},
        schema=dict.fromkeys(("item_id", *TEXT_COLUMNS), pl.String),
    )
    rejects.keep(path.name, frame.height)
    return frame


def _refuse_empty(path: Path, rejects: RejectLog) -> None:
    if rejects.rows_read(path.name) == 0:
        raise InputError(f"{path} holds no lines; delete it and download it again")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line, with a progress bar over the compressed bytes.

    A line above `MAX_LINE_BYTES` comes back cut, one byte longer than the limit.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing; put it there, or name its folder with --data.raw_dir")
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with path.open("rb") as raw, bar:
        task = bar.add_task(path.name, total=path.stat().st_size)
        # GzipFile finds lines in Python; the buffer around it finds them in C.
        with io.BufferedReader(gzip.GzipFile(fileobj=raw), 2**20) as file:
            number = 0
            try:
                while line := file.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    if number % _LINES_PER_UPDATE == 0:
                        bar.update(task, completed=raw.tell())
                    may_have_mark = number == 1 and len(line) <= MAX_LINE_BYTES
                    yield number, line.removeprefix(codecs.BOM_UTF8) if may_have_mark else line
                    while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE_BYTES + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise InputError(
                    f"{path} is not a whole gzip file: {error} (after line {number:,}); delete it and download it again"
                ) from error


def parse_review(line: bytes) -> tuple[str, str, int]:
    """User, item and time of one line of the review file."""
    record = _parse_json(_text(line))
    return _id(record, "reviewerID"), _id(record, "asin"), _time(record)


def parse_meta(line: bytes) -> tuple[str, tuple[str | None, ...]]:
    """Item and its texts, in the order of `TEXT_COLUMNS`, of one line of the metadata file."""
    record = _parse_literal(_text(line))
    texts = (
        _string(record, "title"),
        _string(record, "brand"),
        _paths(record),
        _price(record),
        _string(record, "description"),
    )
    return _id(record, "asin"), texts


def _text(line: bytes) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise _RejectedError("line too long", f"over {MAX_LINE_BYTES:,} bytes")
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise _RejectedError("not UTF-8", f"at byte {error.start}") from None
    if not text:
        raise _RejectedError("blank line")
    return text


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise _RejectedError("duplicate key", excerpt([key for key, _ in pairs]))
    return record


def _refuse_constant(constant: str) -> Any:
    raise _RejectedError("NaN or infinity", constant)


# A decoder built once: json.loads builds one at every call that has arguments.
_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def _parse_json(text: str) -> dict[str, Any]:
    try:
        record = _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise _RejectedError("broken JSON", excerpt(error)) from None
    return _mapping(record)


def _parse_literal(text: str) -> dict[str, Any]:
    try:
        tree = ast.parse(text, mode="eval")
        record = _mapping(ast.literal_eval(tree))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise _RejectedError("not a Python literal", excerpt(error)) from None
    if isinstance(tree.body, ast.Dict) and len(tree.body.keys) != len(record):
        raise _RejectedError("duplicate key", excerpt(list(record)))
    return record


def _mapping(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise _RejectedError("not an object", type(record).__name__)
    return record


def _id(record: dict[str, Any], field: str) -> str:
    if field not in record:
        raise _RejectedError(f"no {field}")
    value = record[field]
    if not isinstance(value, str):
        raise _RejectedError(f"{field} is not a string", excerpt(value))
    if not value.strip():
        raise _RejectedError(f"empty {field}")
    if not is_unicode(value):
        raise _RejectedError(f"{field} is not valid Unicode", excerpt(value))
    return value


def _time(record: dict[str, Any]) -> int:
    if "unixReviewTime" not in record:
        raise _RejectedError("no unixReviewTime")
    value = record["unixReviewTime"]
    if type(value) is not int:  # a bool is an int to isinstance
        raise _RejectedError("unixReviewTime is not an integer", excerpt(value))
    if not 0 < value < MAX_TIME_S:
        raise _RejectedError("unixReviewTime out of range", excerpt(value))
    return value


def _string(record: dict[str, Any], field: str) -> str | None:
    value = record.get(field)
    if value is not None and not isinstance(value, str):
        raise _RejectedError(f"{field} is not a string", excerpt(value))
    return _clean(value) if value else None


def _paths(record: dict[str, Any]) -> str | None:
    """``A > B; C > D`` of ``[["A", "B"], ["C", "D"]]``."""
    value = record.get("categories")
    if value is None:
        return None
    is_paths = isinstance(value, list) and all(isinstance(path, list) for path in value)
    if not is_paths or not all(isinstance(part, str) for path in value for part in path):
        raise _RejectedError("categories is not a list of lists of strings", excerpt(value))
    paths = (" > ".join(filter(None, map(_clean, path))) for path in value)
    return "; ".join(dict.fromkeys(filter(None, paths))) or None


def _price(record: dict[str, Any]) -> str | None:
    value = record.get("price")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _RejectedError("price is not a number", excerpt(value))
    if not 0 <= value < 1e12 or not math.isfinite(value):
        raise _RejectedError("price out of range", excerpt(value))
    return f"{value:.2f}"


def _clean(text: str) -> str | None:
    text = " ".join(html.unescape(text).split())
    if not is_unicode(text):  # half a surrogate pair, which no file can hold: keep the rest of the text
        text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return text or None
