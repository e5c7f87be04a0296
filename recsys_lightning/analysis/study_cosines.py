"""How near the dense vectors of items are within and between semantic IDs (COBRA, section 4.3.1, Figures 4 and 5).

The paper shows pictures and no number; the means here are over all pairs of items, none left out and none drawn.
Axis letters: I items, L code levels, D width, n items drawn for a picture.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_lightning.analysis.groups import shown_path
from recsys_lightning.analysis.study_report import Findings, StudyTable
from recsys_lightning.analysis.study_run import Progress, StudiedRun
from recsys_lightning.errors import InputError
from recsys_lightning.models.cobra import COBRA
from recsys_lightning.semantic_ids.table import SemanticIds

HEAT_ITEMS, MAP_ITEMS = 1000, 3000  # of the two pictures


class CosineGap(NamedTuple):
    """Mean cosines over the pairs of different items."""

    groups: int  # different prefixes
    pairs_within: int
    within: float  # of two items that share the prefix; NaN where no two do
    between: float  # of two that do not; NaN where all share it

    @property
    def gap(self) -> float:
        """By how much items of one prefix are nearer."""
        return self.within - self.between


def cosine_gap(vectors: Tensor, labels: Tensor) -> CosineGap:
    """Mean cosine within and between groups of items, over all pairs.

    The sum over the ordered pairs of a set of unit vectors, an item with itself included, is the squared length of
    their sum; so groups are summed, and no matrix of I x I is made.

    Args:
        vectors: (I, D) of any length.
        labels: (I,) equal for items of one group.
    """
    unit = F.normalize(vectors.double(), dim=-1)  # (I, D)
    _, group, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = unit.new_zeros(len(sizes), unit.shape[1]).index_add(0, group, unit)  # (groups, D)
    with_itself = float(unit.square().sum())  # I, but for vectors of zeros
    within = float(sums.square().sum()) - with_itself
    everything = float(unit.sum(0).square().sum()) - with_itself
    num_items = len(unit)
    pairs_within = int((sizes * (sizes - 1)).sum())
    pairs_between = num_items * (num_items - 1) - pairs_within
    return CosineGap(
        groups=len(sizes),
        pairs_within=pairs_within // 2,
        within=within / pairs_within if pairs_within else float("nan"),
        between=(everything - within) / pairs_between if pairs_between else float("nan"),
    )


def prefix_labels(codes: Tensor, length: int) -> Tensor:
    """(I,) equal for items whose codes (I, L) share the first `length`."""
    label: Tensor = torch.unique(codes[:, :length], dim=0, return_inverse=True)[1]
    return label


class ItemView(NamedTuple):
    """The items of a run, as the pictures draw them."""

    name: str
    vectors: Tensor  # (I, D) unit length
    codes: Tensor  # (I, L)
    codes_of: str  # whose semantic IDs these are


def item_views(runs: Sequence[StudiedRun[COBRA]], semantic_ids: Path | None, progress: Progress) -> list[ItemView]:
    """The items of each run, with its own semantic IDs or, where it has none, those of the first run that has.

    Args:
        runs: with dense vectors, on the same catalogue.
        semantic_ids: a file whose semantic IDs are taken for all runs instead.
        progress: told of each run.

    Raises:
        InputError: a run has no dense vectors, is on other items, or there are no semantic IDs.
    """
    first = runs[0]
    for run in runs:
        if run.model.tokens.paths == "sparse":
            raise InputError(f"{run.name} has no dense vectors (tokens.paths=sparse): there are no cosines to take")
        if run.data.catalog.raw_ids != first.data.catalog.raw_ids:
            raise InputError(f"{run.name} and {first.name} are on different items: study them apart")
    given = None
    if semantic_ids is not None:
        fingerprint = first.data.catalog.text.fingerprint if first.data.catalog.text else None
        given = SemanticIds.load(semantic_ids, fingerprint, first.model.num_items).codes
    owner = next((run for run in runs if run.model.trie is not None), None)
    if given is None and owner is None:
        raise InputError(f"{first.name} has no semantic IDs: name their file with --semantic_ids")
    views = []
    for number, run in enumerate(runs):
        progress("item vectors", number, len(runs))
        with torch.inference_mode():
            vectors = F.normalize(run.model.item_table()[1:], dim=-1).cpu()
        if given is not None:
            codes, whose = given, shown_path(str(semantic_ids))
        else:
            source = run if run.model.trie is not None else owner
            assert source is not None  # noqa: S101 - checked above
            codes, whose = source.model.codes.cpu(), source.name
        views.append(ItemView(run.name, vectors, codes[1:], whose))
    progress("item vectors", len(runs), len(runs))
    return views


def gap_rows(views: Sequence[ItemView]) -> pl.DataFrame:
    """A row a run and prefix length, 1 .. L; the last is the whole semantic ID."""
    rows = []
    for view in views:
        for length in range(1, view.codes.shape[1] + 1):
            found = cosine_gap(view.vectors, prefix_labels(view.codes, length))
            place = {"run": view.name, "semantic_ids": view.codes_of, "prefix": length}
            rows.append({**place, **found._asdict(), "gap": found.gap})
    return pl.DataFrame(rows)


def by_semantic_id(codes: Tensor, count: int, seed: int) -> Tensor:
    """(n,) places of at most `count` items, drawn with equal chance, in the order of their codes (I, L)."""
    drawn = np.sort(np.random.default_rng(seed).permutation(len(codes))[:count])
    order = np.lexsort(codes[drawn].numpy().T[::-1])
    return torch.from_numpy(drawn[order])


def flat_map(vectors: Tensor, seed: int) -> Tensor:
    """(n, 2) t-SNE of unit vectors (n, D) by cosine distance.

    Raises:
        InputError: there are too few items.
    """
    from sklearn.manifold import TSNE

    if len(vectors) < 4:
        raise InputError(f"a t-SNE picture needs at least 4 items, there are {len(vectors)}")
    made = TSNE(
        perplexity=min(30.0, (len(vectors) - 1) / 3), metric="cosine", init="pca", random_state=seed
    ).fit_transform(vectors.numpy())
    return torch.from_numpy(made)


def cosine_study(
    runs: Sequence[StudiedRun[COBRA]], semantic_ids: Path | None, seed: int, progress: Progress
) -> Findings:
    """Measure the gap and draw the pictures.

    Raises:
        InputError: see `item_views` and `flat_map`.
    """
    from recsys_lightning.analysis.study_cosines_figure import heat_png, map_png

    views = item_views(runs, semantic_ids, progress)
    table = gap_rows(views)
    # One order of items and one colour an item for all runs, or the pictures could not be set side by side.
    order = by_semantic_id(views[0].codes, HEAT_ITEMS, seed)
    drawn = by_semantic_id(views[0].codes, MAP_ITEMS, seed)
    maps = []
    for number, view in enumerate(views):
        progress("t-SNE", number, len(views))
        maps.append((view.name, flat_map(view.vectors[drawn], seed)))
    progress("t-SNE", len(views), len(views))
    level1 = views[0].codes[:, 0]
    body = [
        [
            row["run"],
            row["semantic_ids"],
            "whole ID" if row["prefix"] == views[0].codes.shape[1] else f"first {row['prefix']}",
            f"{row['groups']:,}",
            f"{row['pairs_within']:,}",
            *(_number(row[name]) for name in ("within", "between", "gap")),
        ]
        for row in table.iter_rows(named=True)
    ]
    introduction = (
        "Cosines of the items' dense vectors, over all pairs of different items of the catalogue: of two items that "
        "share the codes named (*intra*), and of two that do not (*inter*).",
        f"Above: {len(order):,} items in the order of the semantic IDs of `{views[0].codes_of}`, drawn with seed "
        f"{seed}; lines part the codes of level 1. Below: t-SNE of {len(drawn):,} items, a colour a code of level 1.",
    )
    head = ["run", "semantic IDs of", "codes shared", "prefixes", "pairs that share", "intra", "inter", "gap"]
    return Findings(
        title="Cosines within and between semantic IDs",
        introduction=introduction,
        tables=[StudyTable("Intra- and inter-ID cosine", head, body)],
        remarks=[],
        pictures={
            "-heat.png": heat_png([(v.name, v.vectors[order]) for v in views], level1[order]),
            "-tsne.png": map_png(maps, level1[drawn]),
        },
        files={".csv": table.write_csv().encode()},
        settings={"items": f"{len(level1):,}", "seed": str(seed)},
    )


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f}"
