"""Reading the YAML file of a grid: values of the wrong kind and unknown keys are said with their place."""

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from recsys_lightning.analysis.compare import DEFAULT_METRICS
from recsys_lightning.errors import InputError

# A name is the name of a folder; `seed43` in it would be taken for a seed where runs are grouped.
_NAME = re.compile(r"(?!.*seed[=_-]?\d)[A-Za-z0-9][A-Za-z0-9._+-]*", re.IGNORECASE)
_SETTING = re.compile(r"[A-Za-z_]\w*(\.\w+)*\+?")


def near(word: object, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the most similar known word, or the words that there are."""
    names = list(known)
    match = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; there are {', '.join(names)}" if names else ""


class _UniqueKeys(yaml.SafeLoader):
    """A loader that keeps no silence about a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            name = str(key.value)
            if name in lines and key.tag != "tag:yaml.org,2002:merge":
                raise InputError(f"line {line}: key {name!r} already stands in line {lines[name]}; keep one of them")
            lines[name] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        InputError: it is missing, is not YAML, or holds a key twice.
    """
    if not path.is_file():
        files = [str(file) for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise InputError(f"no grid {path}{near(path, files)}")
    try:
        return _UniqueKeys(path.read_text(encoding="utf-8")).get_single_data()
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


class GridFile:
    """Checks parts of a grid file; what is wrong is said with its place."""

    def __init__(self, path: Path):
        self.path = path

    def mapping(self, value: Any, place: str, known: Iterable[str]) -> dict[str, Any]:
        """A mapping with known keys; nothing counts as an empty one."""
        if not isinstance(value if value is not None else {}, dict):
            raise InputError(f"{self.path}: {place} must hold keys ({', '.join(known)}), not {value!r}")
        given = value or {}
        for key in given:
            if key not in known:
                inside = "" if place == "the file" else f" in {place}"
                raise InputError(f"{self.path}: no key {key!r}{inside}{near(key, known)}")
        return dict(given)

    def named(self, value: Any, place: str) -> dict[str, Any]:
        """A mapping by names of entries."""
        if not isinstance(value if value is not None else {}, dict):
            raise InputError(f"{self.path}: {place} must hold names with their settings, not {value!r}")
        for name in value or {}:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise InputError(
                    f"{self.path}: {place}: {name!r} cannot be the name of a folder of runs: take letters, digits and "
                    "._+- (in quotes if it is a number), and no seed with a number"
                )
        return dict(value or {})

    def settings(self, value: Any, place: str, taken: Mapping[str, str]) -> dict[str, Any]:
        """Keys of the command line with their values."""
        if not isinstance(value if value is not None else {}, dict):
            raise InputError(f"{self.path}: {place} must hold keys of the command line with values, not {value!r}")
        for key in value or {}:
            if not isinstance(key, str) or not _SETTING.fullmatch(key):
                cure = f"; write {str(key).lstrip('-')}" if str(key).startswith("-") else ""
                raise InputError(f"{self.path}: {place}: {key!r} is no key of the command line{cure}")
            if key in taken:
                raise InputError(f"{self.path}: {place}: {key} comes from {taken[key]}; leave it out")
        return dict(value or {})

    def file(self, value: Any, place: str) -> Path:
        """A file that is there, named relative to the grid."""
        path = _relative(self.path.parent, self.text(value, place) or "")
        if not path.is_file():
            files = [str(file) for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            hint = near(path, files) if files else f"; it counts from {self.path.parent}"
            raise InputError(f"{self.path}: {place}: no file {path}{hint}")
        return path

    def text(self, value: Any, place: str) -> str | None:
        """A string, or None."""
        if value is not None and not isinstance(value, str):
            raise InputError(f"{self.path}: {place} must be a string, not {value!r}")
        return value

    def texts(self, value: Any, place: str) -> tuple[str, ...]:
        """Different strings, at least one."""
        if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
            raise InputError(f"{self.path}: {place} must be a list such as {list(DEFAULT_METRICS)}, not {value!r}")
        if len(set(value)) < len(value):
            raise InputError(f"{self.path}: {place} names one twice: {', '.join(value)}")
        return tuple(value)

    def one_of(self, value: Any, place: str, known: Iterable[str]) -> str | None:
        """One of the known words, or None."""
        if value is not None and value not in known:
            raise InputError(f"{self.path}: no {value!r} for {place}{near(value, known)}")
        return None if value is None else str(value)

    def seeds(self, value: Any) -> tuple[int, ...]:
        """Different whole numbers, at least one."""
        right = isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value)
        if not right or len(set(value)) < len(value):
            raise InputError(f"{self.path}: seeds must be a list of different whole numbers, not {value!r}")
        return tuple(value)

    def report(self, value: Any) -> Path | None:
        """A Markdown file, named relative to the grid, or None."""
        if value is None:
            return None
        path = _relative(self.path.parent, self.text(value, "report") or "")
        if path.suffix != ".md":
            raise InputError(f"{self.path}: report: {value} must end with .md; its .csv and .png are written beside it")
        return path


def _relative(folder: Path, name: str) -> Path:
    """A path from a folder, without ``..`` where it can be had, so that it reads as a user would write it."""
    path = (folder / name).resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
