"""The contract of a data source: raw files in, plain tables out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recsys_lightning.data.rejects import RejectLog
from recsys_lightning.errors import InputError


@dataclass(frozen=True)
class RawData:
    """What a source has read: every usable row, in file order, and an account of the rows that were not usable.

    Attributes:
        interactions: columns ``user_id`` (String), ``item_id`` (String), ``timestamp`` (Int64, seconds since 1970, or
            any order-preserving integer where the source has no clock). File order decides among equal times.
        items: column ``item_id`` (String) and one String column a text field (``title``, ``brand``, ...), null where
            the item lacks the field. Items without a row here are legal: they have no text.
        rejects: the rows that were read and not used, by reason, with file and line.
        users: column ``user_id`` (String) and one column a feature, String (a category) or Float64 (a number), null
            where unknown. Users without a row here are legal: nothing is known of them. None without any features.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    rejects: RejectLog
    users: pl.DataFrame | None = None


class Source(ABC):
    """Turns a folder of raw files into `RawData`.

    A source is plain settings: it opens nothing until `read`. `name` and `settings` go into the fingerprint of what is
    built from it, so two sources that would read differently must differ in one of them.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name fit for a folder, such as ``amazon2014-beauty``."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Every setting that changes what `read` returns, as plain JSON values."""

    @abstractmethod
    def files(self, raw_dir: Path) -> list[Path]:
        """The raw files that `read` opens, whether they exist yet or not (empty for a source that makes its data)."""

    def download(self, raw_dir: Path) -> None:
        """Fetch what is missing of `files` into `raw_dir`.

        Raises:
            InputError: the source has no public address; the message says which files it expects and where.
        """
        missing = [str(path) for path in self.files(raw_dir) if not path.is_file()]
        if missing:
            raise InputError(
                f"{self.name}: missing {', '.join(missing)}; "
                "put the files there or name their folder with --data.raw_dir"
            )

    @abstractmethod
    def read(self, raw_dir: Path) -> RawData:
        """Read the files.

        Raises:
            InputError: a file is missing, a named column does not exist, or more rows than allowed are unusable.
        """
