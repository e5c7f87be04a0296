"""The runs of a grid: their folders and command lines, what is left to do of each, and whether they are still those.

A run folder is the whole memory: what it holds says what was done, so that a grid may be broken off anywhere.
"""

import json
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recsys_lightning.analysis.grid import Entry, Grid, substituted
from recsys_lightning.analysis.grid_file import near
from recsys_lightning.analysis.groups import PLACES, load_results
from recsys_lightning.errors import InputError

# Keys of a configuration that say where a run and its data lie, which command came last and what is shown, not what
# was trained.
_PLACES = (
    *PLACES,
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "data.init_args.raw_dir",
    "data.init_args.cache_dir",
)


@dataclass(frozen=True)
class GridRun:
    """One run of a grid.

    Attributes:
        name: the last part of its folder.
        entry: what it is a run of.
        seed: of the run; None takes that of the base file.
        folder: of the run.
        settings: words of its command line, the command and ``--ckpt_path`` left out.
        needs: names of the runs that must be finished first.
        checkpoint: what it tests instead of training; None if it trains.
    """

    name: str
    entry: Entry
    seed: int | None
    folder: Path
    settings: tuple[str, ...]
    needs: tuple[str, ...]
    checkpoint: Path | None

    @property
    def log(self) -> Path:
        """The file of what its commands print: beside the folder, which a fit may move away."""
        return self.folder.with_name(f"{self.name}.log")

    def command(self, verb: str) -> list[str]:
        """Words of a command on it."""
        checkpoint = [f"--ckpt_path={self.checkpoint}"] if self.checkpoint else []
        if verb == "fit":  # it goes on where it was broken off, also if Slurm starts it a second time
            checkpoint = ["--ckpt_path=auto"]
        return [verb, *self.settings, *checkpoint]

    def left(self) -> list[str]:
        """The commands that it still needs, in order; none if it is finished."""
        done = load_results(self.folder) if (self.folder / "results.json").is_file() else None
        fitted = done is not None and "fit" in done["seconds_by_command"]
        tested = done is not None and any(name.startswith("test/") for name in done["metrics"])
        fit = [] if fitted or self.checkpoint else ["fit"]
        # A test of other weights is worth nothing.
        return fit + ([] if self.entry.first or (tested and not fit) else ["test"])


def _broken_off(folder: Path) -> bool:
    checkpoints = folder.glob("checkpoints/*.ckpt")
    return not (folder / "results.json").is_file() and any(map(zipfile.is_zipfile, checkpoints))


# ------------------------------------------------------------------------------------------------------ the whole grid


def expand(grid: Grid, root: Path, options: Sequence[str] = ()) -> dict[str, GridRun]:
    """All runs of a grid by name: first those that others build on, then the variants, seed by seed.

    Args:
        grid: the grid.
        root: folder of the run folders.
        options: words that are added to the command line of every run.
    """
    runs = {}
    for seed in (None, *grid.seeds):
        names = {name: name if entry.first else f"{name}-seed{seed}" for name, entry in grid.entries.items()}
        folders = {name: root / folder for name, folder in names.items()}
        for name, entry in grid.entries.items():
            if entry.first != (seed is None):
                continue
            settings = {key: substituted(value, folders) for key, value in entry.settings.items()}
            words = ["-c", entry.base.as_posix(), *(f"--{key}={_word(value)}" for key, value in settings.items())]
            words += [] if seed is None else [f"--seed_everything={seed}"]
            words += [f"--run_dir={folders[name].as_posix()}", "--trainer.enable_progress_bar=false", *options]
            needs = tuple(names[needed] for needed in entry.needs)
            checkpoint = folders[entry.weights] / "checkpoints" / "best.ckpt" if entry.weights else None
            runs[names[name]] = GridRun(names[name], entry, seed, folders[name], tuple(words), needs, checkpoint)
    return runs


def _word(value: Any) -> str:
    """A value as a command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def chosen(grid: Grid, runs: Mapping[str, GridRun], names: Sequence[str]) -> list[GridRun]:
    """The runs of some entries and all that they need, in the order of the grid; of all entries if none is named.

    Raises:
        InputError: a name is none of the grid's.
    """
    for name in names:
        if name not in grid.entries:
            raise InputError(f"{grid.path}: no entry {name!r}{near(name, grid.entries)}")
    wanted = {run.name for run in runs.values() if not names or run.entry.name in names}
    todo = list(wanted)
    for name in todo:  # grows on the way
        new = [needed for needed in runs[name].needs if needed not in wanted]
        wanted.update(new)
        todo += new
    return [run for run in runs.values() if run.name in wanted]


# ------------------------------------------------------------------------------------- what was run and what would be


def recorded(run: GridRun) -> list[dict[str, Any]]:
    """The configurations that a run has written so far; none if there is nothing in its folder that would be kept.

    Raises:
        InputError: a file is not one of ours.
    """
    found = []
    if (run.folder / "results.json").is_file():
        found.append(load_results(run.folder)["config"])
    config = run.folder / "config.yaml"
    if config.is_file() and (found or _broken_off(run.folder)):
        try:
            found.append(yaml.safe_load(config.read_text(encoding="utf-8")))
        except yaml.YAMLError as error:
            raise InputError(f"{config} is not valid YAML: {' '.join(str(error).split())}") from error
    return found


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], written: Collection[str]
) -> list[tuple[str, object, object]]:
    """Keys in which two configurations differ, with both values; where a run lies and what it shows are no difference.

    Args:
        old: of a run.
        new: as the grid has it now.
        written: keys that the grid and its base file name, without ``init_args`` and ``class_path``. What the old one
            lacks counts only if it is among them: any other is a setting that the program did not have at that time.
    """
    flat = [without_places(config) for config in (old, new)]
    found: list[tuple[str, object, object]] = []
    for key in {**flat[0], **flat[1]}:
        one, other = (part.get(key) for part in flat)  # a key with nothing in it is as good as none
        short = key.replace(".init_args", "").replace(".class_path", "")
        if one != other and (key in flat[0] or short in written):
            found.append((key, one, other))
    return found


def leaves(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a configuration and their values."""
    if isinstance(config, Mapping) and config:
        for name, value in config.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, config


def identity(config: Mapping[str, Any]) -> str:
    """What two configurations have in common that train and measure the same."""
    return json.dumps({key: value for key, value in without_places(config).items() if value is not None})


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys of a configuration and their values, without those that say where a run lies and what it shows."""
    places = tuple(f"{place}." for place in _PLACES)
    return {key: value for key, value in leaves(config) if not f"{key}.".startswith(places)}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def refuse_changed(runs: Mapping[str, GridRun], changes: Mapping[str, Sequence[tuple[str, object, object]]]) -> None:
    """Refuse a grid of which runs were made with other settings, or on other runs, than it has now.

    Args:
        runs: of the grid, by name.
        changes: `differences` of the runs that have anything to keep, by name.

    Raises:
        InputError: the first such run, what differs, and the cure.
    """
    changed = {name: found for name, found in changes.items() if found}
    for name, found in changed.items():
        key, old, new = found[0]
        keys = f" and {_count(len(found) - 1, 'more key')}" if len(found) > 1 else ""
        others = f" ({_count(len(changed) - 1, 'more run')} with other settings)" if len(changed) > 1 else ""
        raise InputError(
            f"{runs[name].folder} was run with {key}={_word(old)}{keys}, the grid now has {_word(new)}: set it back, "
            f"give the variant another name, or move that folder away to run it again{others}"
        )
    for name in changes:
        for needed in runs[name].needs:
            if runs[needed].left():
                raise InputError(
                    f"{runs[name].folder} was built on {runs[needed].folder}, which is no longer finished: "
                    "move both folders away, so that both are made again"
                )
