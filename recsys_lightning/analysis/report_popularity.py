"""Recall by how often an item was met in training: ten groups of the items, from the most met to the least."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_lightning.analysis.report_blocks import Block, Paragraph, Plot, Section
from recsys_lightning.analysis.report_figures import Line, bar_figure
from recsys_lightning.analysis.report_opened import OpenedRun
from recsys_lightning.analysis.user_values import read_ranks
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.errors import InputError

DECILES = 10
NAMES = (*(str(at + 1) for at in range(DECILES)), "new")
_SPLITS: dict[str, Literal["", "_unseen"]] = {"": "", ", unseen": "_unseen"}


class DecileRecall(NamedTuple):
    """Recall of the answers of each group of items; the last group are items that training never met."""

    recall: NDArray[np.float64]  # (11,) NaN where no answer is of the group
    answers: NDArray[np.int64]  # (11,)


def item_deciles(train_counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(I+1,) group of each item: 0..9 by falling interactions in training, as many items in each, 10 for none at all.

    Equal counts go by item id. Index 0 is padding and of group 10.
    """
    groups = np.full(len(train_counts), DECILES)
    met = np.flatnonzero(train_counts > 0)
    order = met[np.argsort(-train_counts[met], kind="stable")]
    groups[order] = np.arange(len(order)) * DECILES // max(len(order), 1)
    return groups


def decile_recall(ranks: pl.DataFrame, catalog: Catalog, k: int, column: Literal["", "_unseen"]) -> DecileRecall:
    """The chance that an answer is among the first k places, by the group of the answer.

    An answer that shares its score with others is within k by chance, ``(k - first + 1) / tied``. Each answer counts
    once: of users with one answer each this is the mean of their recall@k.

    Args:
        ranks: of `read_ranks`.
        catalog: the items and their counts.
        k: cut-off.
        column: ``_unseen`` takes the lists without items that the user has met.

    Raises:
        InputError: an answer is no item of the catalogue.
    """
    number = pl.DataFrame({"item_id": catalog.raw_ids, "item": range(1, catalog.num_items + 1)})
    items = ranks.join(number, on="item_id", how="left", maintain_order="left")["item"]
    if items.null_count():
        raise InputError("the ranks name items that the catalogue lacks: they are of other data")
    first, tied = (ranks[f"{name}{column}"].to_numpy().astype(np.float64) for name in ("first", "tied"))
    hit = np.where(first > 0, np.clip((k - first + 1) / np.maximum(tied, 1), 0, 1), 0)
    group = item_deciles(np.asarray(catalog.train_counts))[items.to_numpy()]
    answers = np.bincount(group, minlength=DECILES + 1)
    hits = np.bincount(group, weights=hit, minlength=DECILES + 1)
    recall = np.divide(hits, answers, out=np.full(DECILES + 1, np.nan), where=answers > 0)
    return DecileRecall(recall, answers)


def popularity(runs: Sequence[OpenedRun], k: int | None) -> Section:
    """Recall by decile of each run that was ranked.

    Args:
        runs: opened.
        k: cut-off; None for runs without recall.
    """
    bars: dict[str, list[Line]] = {split: [] for split in _SPLITS}
    counts = []
    remarks: list[str] = []
    for style, run in enumerate(runs):
        if run.studied is None or k is None:
            continue
        path = _ranks_file(run.source.run.folder)
        if path is None:
            remarks.append(f"{run.name} has left no ranks: run `recsys test`.")
            continue
        stage = path.stem.removeprefix("ranks-")
        table = read_ranks(path)
        shown = run.name if stage == "test" else f"{run.name} (validation)"
        for split, column in _SPLITS.items():
            found = decile_recall(table, run.catalog, k, column)
            there = [at for at in range(DECILES + 1) if found.answers[at]]
            texts = [f"{found.answers[at]:,} answers" for at in there]
            bars[split].append(Line(shown, there, found.recall[there].tolist(), style, text=texts))
        counts.append(Line(shown, there, found.answers[there].tolist(), style))
    blocks: list[Block] = []
    if counts:
        note = (
            "Ten groups of as many items each by their training interactions, 1 the most met, new those it never "
            "met; recall of the answers in each."
        )
        for lines, title in zip(bars.values(), ("all items", "without items already met"), strict=True):
            names = _names(lines)
            figure = bar_figure(_placed(lines, names), "decile of the items", f"recall@{k}", names=names)
            blocks.append(Plot(f"Recall@{k} by popularity, {title}", figure, note))
        names = _names(counts)
        figure = bar_figure(_placed(counts, names), "decile of the items", "answers", names=names)
        blocks.append(Plot("Answers by popularity", figure, "How many answers each of the bars stands on."))
        blocks += [Paragraph(line) for line in remarks]
    return Section("popularity", "Recall by popularity", blocks, " ".join(remarks) or "No run ranks items.")


def _names(lines: Sequence[Line]) -> list[str]:
    """The groups that any line has."""
    there = {int(at) for line in lines for at in line.x}
    return [NAMES[at] for at in sorted(there)]


def _placed(lines: Sequence[Line], names: Sequence[str]) -> list[Line]:
    return [line._replace(x=[names.index(NAMES[int(at)]) for at in line.x]) for line in lines]


def _ranks_file(folder: Path) -> Path | None:
    return next((path for stage in ("test", "val") if (path := folder / f"ranks-{stage}.parquet").is_file()), None)
