"""The two files in a run folder that tell of its codebooks, and what loggers show of them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing
from recsys_lightning.semantic_ids.health import CodebookState
from recsys_lightning.training.codebook_report import codebook_levels

USAGE_FILE = "codebook-usage.parquet"
EVENTS_FILE = "codebook-events.jsonl"
_COLUMNS = pl.Schema({"epoch": pl.Int32, "step": pl.Int64, "level": pl.Int16, "code": pl.Int32, "items": pl.Int32})


@dataclass(frozen=True, kw_only=True)
class CodebookEvent:
    """Something that was found of a codebook, and what was done about it.

    Attributes:
        epoch: from 0, as in ``metrics.csv``.
        step: steps of the optimizer so far.
        level: from 1, the coarsest.
        finding: ``low_perplexity`` or ``dead_codes``.
        action: ``warn``, ``stop``, ``reset_dead``, ``reseed``, ``raise_sinkhorn`` or ``gave_up``.
        codes: of that level that have a new codeword, from 0.
        before: figures of the level, by name.
        after: the same right after a repair; empty where nothing was repaired.
        message: all of it in a sentence.
    """

    epoch: int
    step: int
    level: int
    finding: str
    action: str
    codes: tuple[int, ...]
    before: Mapping[str, float]
    after: Mapping[str, float]
    message: str


class CodebookFiles:
    """Writes ``codebook-usage.parquet`` and ``codebook-events.jsonl`` into the folder of a run.

    The first has a row for each code of each level at each check: ``epoch``, ``step``, ``level`` (from 1), ``code``
    (from 0), ``items``. The second has a `CodebookEvent` a line. After each check both are whole.

    Args:
        folder: of the run.
        resumed_at: step that training goes on from: what an earlier attempt wrote of later steps is dropped. None for a
            new training: what the files held is dropped.

    Raises:
        InputError: the files of the training that goes on are damaged.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        self.folder = folder
        self.usage, self.events = pl.DataFrame(schema=_COLUMNS), list[str]()
        if resumed_at is not None:
            self.usage = _usage_until(folder / USAGE_FILE, resumed_at)
            self.events = _events_until(folder / EVENTS_FILE, resumed_at)
        for name, known in ((USAGE_FILE, self.usage.height), (EVENTS_FILE, len(self.events))):
            if not known:
                (folder / name).unlink(missing_ok=True)

    def add_usage(self, epoch: int, step: int, counts: Tensor) -> None:
        """Note how many items have each code, counts (L, K); one of the same epoch is replaced."""
        levels, codes = counts.shape
        rows = pl.DataFrame({"level": range(1, levels + 1)}).join(pl.DataFrame({"code": range(codes)}), how="cross")
        rows = rows.with_columns(epoch=pl.lit(epoch), step=pl.lit(step), items=pl.Series(counts.flatten().tolist()))
        rows = rows.select(pl.col(name).cast(kind) for name, kind in _COLUMNS.items())
        self.usage = pl.concat([self.usage.filter(pl.col("epoch") < epoch), rows])
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / USAGE_FILE) as file:
            self.usage.write_parquet(file)

    def add_events(self, events: Iterable[CodebookEvent]) -> None:
        """Note what was found and done."""
        lines = [json.dumps(asdict(event)) for event in events]
        if not lines:
            return
        self.events += lines
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / EVENTS_FILE) as file:
            file.write("".join(f"{line}\n" for line in self.events).encode())


def num_events(folder: Path) -> int:
    """How many events a run has noted."""
    path = folder / EVENTS_FILE
    return len(path.read_text().splitlines()) if path.is_file() else 0


def show_usage(loggers: Iterable[Logger], state: CodebookState, step: int) -> None:
    """Give W&B and TensorBoard what other loggers cannot hold: histograms and tables of how the codes are used.

    ``codebook/items_per_code@l`` is a histogram over the codes of level l of how many items they have: dead codes stand
    at 0. ``codebook/usage`` is a table: for W&B the items of each code, for TensorBoard, which has none, a text with a
    line a level.
    """
    counts = {f"codebook/items_per_code@{n}": row for n, row in enumerate(state.usage.counts.cpu(), start=1)}
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            for name, row in counts.items():
                logger.experiment.add_histogram(name, row, step)
            logger.experiment.add_text("codebook/usage", _as_markdown(state), step)
        elif isinstance(logger, WandbLogger):
            import wandb  # an extra: it is there where its logger is

            logger.log_metrics({name: wandb.Histogram(row.tolist()) for name, row in counts.items()}, step)
            lists = enumerate((row.tolist() for row in counts.values()), start=1)
            rows = [[level, code, items] for level, row in lists for code, items in enumerate(row)]
            logger.log_table("codebook/usage", columns=["level", "code", "items"], data=rows, step=step)


def _as_markdown(state: CodebookState) -> str:
    lines = ["| level | codes | dead | perplexity | entropy / log codes | Gini |", "|" + " ---: |" * 6]
    for row in codebook_levels(state):
        figures = f"{row.perplexity:.1f} | {row.entropy:.3f} | {row.gini:.3f}"
        lines.append(f"| {row.level} | {row.size} | {row.dead_codes} | {figures} |")
    return "\n".join(lines)


def _usage_until(path: Path, step: int) -> pl.DataFrame:
    if not path.is_file():
        return pl.DataFrame(schema=_COLUMNS)
    try:
        return pl.read_parquet(path).select(list(_COLUMNS)).cast(_COLUMNS).filter(pl.col("step") <= step)
    except pl.exceptions.PolarsError as error:
        raise InputError(
            f"{path} is no table of code usage, or a damaged one ({error}); remove it, and the run goes on without "
            "what it held"
        ) from error


def _events_until(path: Path, step: int) -> list[str]:
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        return [line for line in lines if json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} holds a line that is no event ({error}); remove it, and the run goes on without what it held"
        ) from error
