"""Runs as they lie on disk, finished or under way: a file that is half written is read as far as it goes."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from recsys_lightning.analysis.groups import Run, load_results, results_file, shown_path
from recsys_lightning.errors import InputError

USAGE, EVENTS = "codebook-usage.parquet", "codebook-events.jsonl"
_USAGE_COLUMNS = ("epoch", "step", "level", "code", "items")


@dataclass(frozen=True)
class Source:
    """What a run has left so far.

    Attributes:
        run: its name, folder and results; of a run under way what its configuration and its metrics so far tell.
        finished: it has results.
        metrics: of ``metrics.csv``, numbers only; empty before the first.
        usage: of ``codebook-usage.parquet``; None without one.
        events: of ``codebook-events.jsonl``.
        remarks: what could not be read.
    """

    run: Run
    finished: bool
    metrics: pl.DataFrame
    usage: pl.DataFrame | None
    events: tuple[dict[str, Any], ...]
    remarks: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder, as a report may show it."""
        return self.run.name

    def curve(self, column: str) -> tuple[list[float], list[float]]:
        """Steps and values of a logged number, where it was logged; empty if it never was."""
        if column not in self.metrics.columns or "step" not in self.metrics.columns:
            return [], []
        rows = self.metrics.select("step", column).drop_nulls().filter(pl.col(column).is_finite())
        return rows["step"].to_list(), rows[column].to_list()


def read_source(name: str | Path, live: bool = False) -> Source:
    """A run by its folder or its ``results.json``.

    Args:
        name: of the folder.
        live: it may be under way: results older than its configuration are those of a training before.

    Raises:
        InputError: there is no such run, or its results are none of ours.
    """
    folder = results_file(name).parent if Path(name).suffix == ".json" else Path(name)
    if not folder.is_dir():
        raise InputError(f"no run folder {folder}")
    finished = is_finished(folder) if live else (folder / "results.json").is_file()
    remarks: list[str] = []
    metrics = _read_metrics(folder / "metrics.csv")
    events = _read_events(folder / EVENTS, remarks)
    usage = _read_usage(folder / USAGE, remarks)
    results = load_results(folder) if finished else _results_so_far(folder, metrics)
    run = Run(shown_path(folder.as_posix()), folder, results)
    return Source(run, finished, metrics, usage, tuple(events), tuple(remarks))


def is_finished(folder: Path) -> bool:
    """Whether a training has left its results: there are some, no older than its configuration."""
    results, config = folder / "results.json", folder / "config.yaml"
    if not results.is_file():
        return False
    return not config.is_file() or results.stat().st_mtime >= config.stat().st_mtime


def _read_metrics(path: Path) -> pl.DataFrame:
    """Numbers by step; whatever stands behind the last whole line is still being written."""
    if not path.is_file():
        return pl.DataFrame()
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if not whole.strip():
        return pl.DataFrame()
    table = pl.read_csv(io.BytesIO(whole), infer_schema=False, truncate_ragged_lines=True)
    return table.select(pl.all().cast(pl.Float64, strict=False))


def _read_usage(path: Path, remarks: list[str]) -> pl.DataFrame | None:
    if not path.is_file():
        return None
    try:
        table = pl.read_parquet(path.read_bytes())
    except (pl.exceptions.PolarsError, OSError) as error:
        remarks.append(f"{path.name} cannot be read ({str(error).splitlines()[0]}); it may be being written.")
        return None
    missing = [name for name in _USAGE_COLUMNS if name not in table.columns]
    if missing:
        remarks.append(f"{path.name} lacks {', '.join(missing)}: CodebookHealth has not written it.")
        return None
    return table


def _read_events(path: Path, remarks: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    *whole, _ = path.read_text(errors="replace").split("\n")  # the last line is empty or still being written
    found, bad = [], 0
    for line in whole:
        try:
            event = json.loads(line) if line.strip() else None
        except ValueError:
            bad += 1
            continue
        if isinstance(event, dict):
            found.append(event)
    if bad:
        remarks.append(f"{bad} lines of {path.name} are not JSON and are left out.")
    return found


def _results_so_far(folder: Path, metrics: pl.DataFrame) -> dict[str, Any]:
    """The parts of a ``results.json`` that are known while a run is under way.

    Raises:
        InputError: it has no configuration, so it is no run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"{folder} holds no config.yaml: it is no run that `recsys fit` wrote")
    config = yaml.safe_load(path.read_text())
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no settings: it is no run that `recsys fit` wrote")
    return {
        "run": str(folder),
        "model": model_name(config),
        "seed": config.get("seed_everything"),
        "metrics": best_validation(metrics, config),
        "data": {},
        "hardware": {},
        "seconds_by_command": {},
        "code": {},
        "config": config,
    }


def model_name(config: Mapping[str, Any]) -> str:
    """The class of a configuration's model or tokenizer."""
    part: Any = config.get("model")
    for inner in ("model", "tokenizer"):
        settings = part.get("init_args") if isinstance(part, Mapping) else None
        if isinstance(settings, Mapping) and inner in settings:
            part = settings[inner]
    path = part.get("class_path") if isinstance(part, Mapping) else part
    return str(path or "?").rpartition(".")[2]


def best_validation(metrics: pl.DataFrame, config: Mapping[str, Any]) -> dict[str, float]:
    """The validation metrics of the epoch that would be kept, and of the last where nothing says which."""
    names = [name for name in metrics.columns if name.startswith(("val/", "val-unseen/"))]
    if not names:
        return {}
    rows = metrics.select(names).filter(pl.any_horizontal(pl.all().is_not_null()))
    chosen = config.get("checkpoint")
    monitor, mode = (chosen.get("monitor"), chosen.get("mode")) if isinstance(chosen, Mapping) else (None, None)
    if monitor in names and rows[monitor].is_not_null().any():
        at = rows[monitor].arg_min() if mode == "min" else rows[monitor].arg_max()
    else:
        at = len(rows) - 1
    row = rows.row(at if at is not None else -1, named=True) if len(rows) else {}
    return {name: float(value) for name, value in row.items() if value is not None}
