"""The account of rows that were read and could not be used."""

import math
from collections import Counter
from typing import Any, Self

from recsys_lightning.errors import InputError

NUM_EXAMPLES = 5
MAX_EXCERPT = 60  # characters


class RejectLog:
    """Counts every row of every file: read, kept, and rejected by reason.

    Reading, keeping and rejecting are counted on their own, so that `check` can prove that no row got lost:
    ``rows_read == rows_kept + sum(rejected)`` for each file.
    """

    def __init__(self) -> None:
        self._read: Counter[str] = Counter()
        self._kept: Counter[str] = Counter()
        self._rejected: dict[str, Counter[str]] = {}
        self._examples: dict[str, list[str]] = {}

    @property
    def files(self) -> list[str]:
        """The files of which at least one row was counted, in the order of their first row."""
        return list(dict.fromkeys([*self._read, *self._kept, *self._rejected]))

    def read(self, file: str, count: int = 1) -> None:
        """Count rows that were read."""
        self._read[file] += count

    def keep(self, file: str, count: int = 1) -> None:
        """Count rows that are used."""
        self._kept[file] += count

    def reject(self, file: str, where: int | str, reason: str, detail: str = "", count: int = 1) -> None:
        """Count rows that are not used.

        Args:
            file: name of the file.
            where: line number, or another place in the file such as ``row 7``.
            reason: one of a few fixed phrases; rows are counted by it.
            detail: what this row held; only shown in the examples.
            count: how many rows this stands for.
        """
        self._rejected.setdefault(file, Counter())[reason] += count
        examples = self._examples.setdefault(file, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(f"{file}:{where}: {reason} {detail}".rstrip())

    def rows_read(self, file: str | None = None) -> int:
        """The number of rows read from a file, or from all."""
        return self._read.total() if file is None else self._read[file]

    def rows_kept(self, file: str | None = None) -> int:
        """The number of rows used of a file, or of all."""
        return self._kept.total() if file is None else self._kept[file]

    def rows_rejected(self, file: str | None = None) -> int:
        """The number of rows rejected of a file, or of all."""
        files = self._rejected if file is None else [file]
        return sum(self._rejected.get(name, Counter()).total() for name in files)

    def reasons(self, file: str) -> dict[str, int]:
        """The number of rejected rows of a file by reason, the most frequent first."""
        return dict(self._rejected.get(file, Counter()).most_common())

    def examples(self, file: str) -> list[str]:
        """The first rejected rows of a file, each as ``file:line: reason detail``."""
        return list(self._examples.get(file, []))

    def check(self, max_share: float) -> None:
        """Refuse a file with too many rejected rows.

        Raises:
            InputError: the rejected share of some file is above `max_share`.
            RuntimeError: the counts of a file do not add up, which is a bug of the source.
        """
        for file in self.files:
            read, kept, rejected = self.rows_read(file), self.rows_kept(file), self.rows_rejected(file)
            if read != kept + rejected:
                raise RuntimeError(f"{file}: {read} rows read, but {kept} kept and {rejected} rejected")
            if rejected > max_share * read:
                raise InputError(self._complaint(file, max_share))

    def _complaint(self, file: str, max_share: float) -> str:
        read, rejected = self.rows_read(file), self.rows_rejected(file)
        counts = ", ".join(f"{reason}: {count:,}" for reason, count in self.reasons(file).items())
        return (
            f"{file}: {rejected:,} of {read:,} rows ({rejected / read:.4%}) cannot be used, "
            f"the limit is {max_share:.4%} ({counts}); first: {'; '.join(self.examples(file))}; "
            f"mend the file, or raise max_rejected of the source to at least {_rounded_up(rejected / read)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The account as plain JSON values, one entry a file."""
        return {
            file: {
                "read": self.rows_read(file),
                "kept": self.rows_kept(file),
                "rejected": self.reasons(file),
                "examples": self.examples(file),
            }
            for file in self.files
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The account that `to_dict` wrote."""
        log = cls()
        for file, counts in values.items():
            log.read(file, int(counts["read"]))
            log.keep(file, int(counts["kept"]))
            if counts["rejected"]:
                log._rejected[file] = Counter(counts["rejected"])
                log._examples[file] = list(counts["examples"])
        return log

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RejectLog) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it changes while rows are read

    def __repr__(self) -> str:
        return f"RejectLog(read={self.rows_read()}, kept={self.rows_kept()}, rejected={self.rows_rejected()})"


def _rounded_up(share: float) -> float:
    """The share with four decimals, never below the one given."""
    return math.ceil(share * 10_000) / 10_000


def is_unicode(text: str) -> bool:
    """Whether a file can hold the text: lone surrogates, which stand for undecodable bytes, cannot be written."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def excerpt(value: object) -> str:
    """A rejected value, or what an exception says of it, on one short line."""
    try:
        text = " ".join(str(value).split()) if isinstance(value, BaseException) else ascii(value)
    except (ValueError, RecursionError, MemoryError):  # an integer of more than 4,300 digits cannot be written
        text = ""
    text = text or type(value).__name__
    return text if len(text) <= MAX_EXCERPT else text[:MAX_EXCERPT] + "..."
