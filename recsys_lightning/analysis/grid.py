"""A grid of an ablation: one short YAML that names a base experiment and what differs from it, run by run."""

import graphlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys_lightning.analysis.compare import DEFAULT_METRICS
from recsys_lightning.analysis.grid_file import GridFile, near, read_yaml
from recsys_lightning.analysis.published import TABLE_2
from recsys_lightning.errors import InputError

_KEYS = ("title", "base", "seeds", "set", "first", "variants", "metrics", "published", "report")
_FIRST_KEYS = ("base", "set")
_VARIANT_KEYS = ("base", "set", "weights")
# What the grid itself gives to each run, and from which of its keys.
_TAKEN = {"run_dir": "the name of the run", "ckpt_path": "weights", "config": "base", "c": "base"}
_SEED = {"seed_everything": "seeds"}
_REFERENCE = re.compile(r"\{\{|\}\}|(?<!\$)\{([^{}]*)\}")


@dataclass(frozen=True)
class Entry:
    """A setting that is trained, or only tested, once a seed.

    Attributes:
        name: of the variant or of the run that others build on.
        base: file of the experiment.
        settings: keys of the command line and their values, in the order in which they take effect.
        own: those of them that are this entry's alone.
        weights: the entry whose checkpoint this one tests, training nothing; None if it trains.
        first: it stands under ``first``: trained once, with the seed of its base, and no row of the table.
    """

    name: str
    base: Path
    settings: dict[str, Any]
    own: dict[str, Any]
    weights: str | None = None
    first: bool = False

    @property
    def references(self) -> list[str]:
        """Entries whose run folders the settings name as ``{name}``."""
        return list(dict.fromkeys(name for value in self.settings.values() for name in _references(value)))

    @property
    def needs(self) -> list[str]:
        """Entries that must be finished first."""
        return list(dict.fromkeys([*self.references, *([self.weights] if self.weights else [])]))


@dataclass(frozen=True)
class Grid:
    """A grid as its file says, checked: all names are known, no entry waits for itself, all base files are there.

    Attributes:
        path: the file.
        title: of the table.
        base: file of the experiment, where a variant names no other.
        seeds: of each variant.
        common: keys that are set in all variants.
        entries: by name, those under ``first`` first, then the variants; the first variant is the baseline.
        metrics: columns of the table.
        published: data set of the paper's rows beside it, or None.
        report: Markdown file of the table, or None.
    """

    path: Path
    title: str
    base: Path
    seeds: tuple[int, ...]
    common: dict[str, Any]
    entries: dict[str, Entry]
    metrics: tuple[str, ...]
    published: str | None
    report: Path | None

    @property
    def variants(self) -> list[Entry]:
        """The rows of the table."""
        return [entry for entry in self.entries.values() if not entry.first]


def load_grid(path: Path, report: Path | None = None) -> Grid:
    """Read a grid.

    Args:
        path: the file.
        report: Markdown file of the table in place of the one that the grid names.

    Raises:
        InputError: the file is missing or not YAML, or holds a key, name or value that cannot be used; the message
            names it and, for a mistyped one, the nearest that can.
    """
    read = GridFile(path)
    given = read.mapping(read_yaml(path), "the file", _KEYS)
    for key in ("base", "variants"):
        if not given.get(key):
            raise InputError(f"{path}: {key} is missing; a grid needs base, a file, and variants, named settings of it")
    base, common = read.file(given["base"], "base"), read.settings(given.get("set"), "set", _TAKEN | _SEED)
    entries: dict[str, Entry] = {}
    for name, settings in read.named(given.get("first"), "first").items():
        own = read.mapping(settings, f"first.{name}", _FIRST_KEYS)
        made = read.settings(own.get("set"), f"first.{name}.set", _TAKEN)
        file = read.file(own["base"], f"first.{name}.base") if "base" in own else base
        entries[name] = Entry(name, file, made, made, first=True)
    variants = read.named(given["variants"], "variants")
    if double := [name for name in variants if name in entries]:
        raise InputError(f"{path}: {double[0]} stands under first and under variants; rename one of the two")
    for name, settings in variants.items():
        own = read.mapping(settings, f"variants.{name}", _VARIANT_KEYS)
        made = read.settings(own.get("set"), f"variants.{name}.set", _TAKEN | _SEED)
        weights = read.text(own.get("weights"), f"variants.{name}.weights")
        if weights is not None and "base" in own:
            raise InputError(f"{path}: variants.{name} takes its base from its weights; leave out base")
        file = read.file(own["base"], f"variants.{name}.base") if "base" in own else base
        entries[name] = Entry(name, file, _merged(common, made), made, weights)
    _check_references(path, entries)
    entries = {name: _with_settings_of_weights(entry, entries) for name, entry in entries.items()}
    return Grid(
        path=path,
        title=read.text(given.get("title"), "title") or f"Ablation: {path.stem}",
        base=base,
        seeds=read.seeds(given.get("seeds", [42])),
        common=common,
        entries=entries,
        metrics=read.texts(given.get("metrics", list(DEFAULT_METRICS)), "metrics"),
        published=read.one_of(given.get("published"), "published", sorted(TABLE_2)),
        report=read.report(given.get("report") if report is None else str(report.absolute())),
    )


def substituted(value: Any, folders: Mapping[str, Path]) -> Any:
    """A value with each ``{name}`` replaced by a run folder; ``{{`` and ``}}`` stand for single braces."""
    if isinstance(value, str):
        return _REFERENCE.sub(lambda m: m[0][0] if m[1] is None else folders[m[1]].as_posix(), value)
    if isinstance(value, list):
        return [substituted(inner, folders) for inner in value]
    if isinstance(value, dict):
        return {key: substituted(inner, folders) for key, inner in value.items()}
    return value


def _references(value: Any) -> list[str]:
    if isinstance(value, str):
        return [match[1] for match in _REFERENCE.finditer(value) if match[1] is not None]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [name for part in inner for name in _references(part)]


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings one after the other: what is set again moves to its new place, since later ones win."""
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            merged.pop(key, None)
            merged[key] = value
    return merged


def _check_references(path: Path, entries: Mapping[str, Entry]) -> None:
    for name, entry in entries.items():
        place = f"{'first' if entry.first else 'variants'}.{name}"
        for needed in entry.needs:
            if needed not in entries:
                what = f"weights: {needed}" if needed == entry.weights else f"{{{needed}}}"
                cure = "" if needed == entry.weights else "; braces that are meant as such are doubled: {{ }}"
                raise InputError(f"{path}: {place}: no entry for {what}{near(needed, entries)}{cure}")
            if entry.first and not entries[needed].first:
                raise InputError(f"{path}: {place} builds on the variant {needed}; move {needed} to first as well")
    try:
        graphlib.TopologicalSorter({name: entry.needs for name, entry in entries.items()}).prepare()
    except graphlib.CycleError as error:
        raise InputError(f"{path}: these wait for one another: {' -> '.join(reversed(error.args[1]))}") from error
    for name, entry in entries.items():
        source = entries[entry.weights].weights if entry.weights is not None else None
        if source is not None:
            raise InputError(
                f"{path}: variants.{name}: {entry.weights} trains nothing; name {source}, whose weights it takes"
            )


def _with_settings_of_weights(entry: Entry, entries: Mapping[str, Entry]) -> Entry:
    """A checkpoint fits the settings that it was trained with, so a variant that takes one begins with those."""
    if entry.weights is None:
        return entry
    source = entries[entry.weights]
    return Entry(entry.name, source.base, _merged(source.settings, entry.own), entry.own, entry.weights)
