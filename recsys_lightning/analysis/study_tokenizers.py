"""Tokenizers side by side: what their codes look like, and what a recommender makes of them.

Whether a cheap figure of the codes foretells recall is the question: the rank correlation over tokenizers answers it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from recsys_lightning.analysis.codes_agreement import next_code_agreement, next_code_information, training_sequences
from recsys_lightning.analysis.codes_measures import agreement, category_labels
from recsys_lightning.analysis.groups import Score, load_results
from recsys_lightning.analysis.study_run import Progress, StudiedRun
from recsys_lightning.errors import InputError
from recsys_lightning.models.cobra import COBRA
from recsys_lightning.semantic_ids.table import CollisionReport, SemanticIds

# Fewer tokenizers than this say nothing of a correlation.
_FEWEST = 4


class Bench(NamedTuple):
    """What a study of tokenizers asks for.

    Attributes:
        metrics: of the recommender's test, the first of which cheap figures are correlated with.
        field: of the catalogue, that holds paths of categories; None takes no categories.
        level: of the categories, from 1.
    """

    metrics: tuple[str, ...] = ("recall@10", "ndcg@10")
    field: str | None = "categories"
    level: int = 2


class Tokenized(NamedTuple):
    """One tokenizer's codes and what became of them.

    Attributes:
        name: folder of the tokenizer's run.
        made_by: its class.
        collisions: the policy.
        cpu_seconds: of its fit, embedding of texts left out; None if the run does not say.
        report: of its table.
        levels, num_codes: L and K.
        reconstruction_error: share of the embeddings' spread that its own codes lose, before any policy of collisions.
        nmi: of level-1 codes and categories; None without categories.
        agreement: of level-1 codes of consecutive items, over what chance would have.
        information: normalised mutual information of the level-1 codes of an item and of the next.
        scores: of the recommender's test, by metric, over seeds.
    """

    name: str
    made_by: str
    collisions: str
    cpu_seconds: float | None
    report: CollisionReport
    levels: int
    num_codes: int
    reconstruction_error: float | None
    nmi: float | None
    agreement: float
    information: float
    scores: dict[str, Score]

    @property
    def unique(self) -> float:
        """Items that share their codes with no other, as a share."""
        return 1 - self.report.collision_rate

    @property
    def perplexity_share(self) -> tuple[float, ...]:
        """(L,) perplexity of each level over its size."""
        return tuple(value / self.num_codes for value in self.report.perplexity)


class Figure(NamedTuple):
    """A cheap figure of codes: one that needs no recommender."""

    heading: str
    value: Callable[[Tokenized], float | None]
    decimals: int


FIGURES = (
    Figure("CPU seconds", lambda of: of.cpu_seconds, 1),
    Figure("unique items", lambda of: of.unique, 3),
    Figure("cells", lambda of: float(of.report.num_cells), 0),
    Figure("largest cell", lambda of: float(of.report.largest_cell), 0),
    Figure("perplexity / K, level 1", lambda of: of.perplexity_share[0], 3),
    Figure("perplexity / K, worst", lambda of: min(of.perplexity_share), 3),
    Figure("entropy share, mean", lambda of: float(np.mean(of.report.entropy_share)), 3),
    Figure("reconstruction error", lambda of: of.reconstruction_error, 3),
    Figure("NMI with categories", lambda of: of.nmi, 3),
    Figure("next-item agreement", lambda of: of.agreement, 2),
    Figure("next-item NMI", lambda of: of.information, 3),
)


class Correlation(NamedTuple):
    """Spearman's rank correlation of a cheap figure with the recommender's metric, over tokenizers."""

    figure: str
    rho: float | None  # None where the figure is the same of all, or known of too few
    p: float | None
    tokenizers: int


def measure(runs: Sequence[StudiedRun[COBRA]], bench: Bench, progress: Progress) -> list[Tokenized]:
    """Measure the tokenizer behind each run; runs on the same table are seeds of one row.

    Raises:
        InputError: a run reads no table, was not tested, or is on other items than the first.
    """
    by_table: dict[Path, list[StudiedRun[COBRA]]] = {}
    for run in runs:
        by_table.setdefault(_table_of(run), []).append(run)
    catalog = runs[0].data.catalog
    labels = None
    if bench.field is not None and bench.field in catalog.fields.columns:
        labels = category_labels(catalog.fields, bench.field, bench.level)
    sequences = training_sequences(runs[0].data.data.interactions, runs[0].data.split)
    found = []
    for done, (path, own) in enumerate(by_table.items()):
        progress("tokenizers", done, len(by_table))
        if any(run.data.catalog.raw_ids != catalog.raw_ids for run in own):
            raise InputError(f"{own[0].name} and {runs[0].name} are on different items: study them apart")
        table, results = SemanticIds.load(path), _results_beside(path)
        codes = table.codes.numpy()  # (I+1, L)
        agreed = None if labels is None else agreement(codes[1:, 0], labels)
        share, chance = next_code_agreement(codes[:, :1], sequences)[0]
        found.append(
            Tokenized(
                name=path.parent.name,
                made_by=str(results.get("model", "")),
                collisions=str(results.get("semantic_ids", {}).get("collisions", {}).get("policy", "none")),
                cpu_seconds=results.get("cpu_seconds_by_command", {}).get("fit"),
                report=table.collision_report(),
                levels=table.num_levels,
                num_codes=table.num_codes,
                reconstruction_error=results.get("metrics", {}).get("val/reconstruction_error"),
                nmi=None if agreed is None else agreed.nmi,
                agreement=share / chance,
                information=next_code_information(codes[:, 0], sequences),
                scores={metric: _score(own, metric) for metric in bench.metrics},
            )
        )
    progress("tokenizers", len(by_table), len(by_table))
    return found


def correlations(rows: Sequence[Tokenized], metric: str) -> list[Correlation]:
    """Spearman's rho of each cheap figure with a metric's mean over seeds; a figure that a row lacks leaves it out."""
    found = []
    for figure in FIGURES:
        known = [(value, row.scores[metric].mean) for row in rows if (value := figure.value(row)) is not None]
        rho = p = None
        if len(known) >= _FEWEST and len({value for value, _ in known}) > 1:
            result = spearmanr(*zip(*known, strict=True))
            rho, p = (float(number) for number in (result.statistic, result.pvalue))
        undefined = rho is None or math.isnan(rho)
        found.append(Correlation(figure.heading, None if undefined else rho, None if undefined else p, len(known)))
    return found


def _table_of(run: StudiedRun[COBRA]) -> Path:
    settings = run.results["config"]["model"]["init_args"]["model"]["init_args"]
    path = settings.get("semantic_ids")
    if not path:
        raise InputError(f"{run.name} reads no semantic IDs: there is no tokenizer to measure")
    return Path(path)


def _results_beside(table: Path) -> Mapping[str, Any]:
    """The results of the run that wrote a table; nothing where there is none, as of an imported one."""
    return load_results(table.parent) if (table.parent / "results.json").is_file() else {}


def _score(runs: Sequence[StudiedRun[COBRA]], metric: str) -> Score:
    name = f"test/{metric}"
    missing = [run.name for run in runs if name not in run.results["metrics"]]
    if missing:
        raise InputError(f"{missing[0]} has no {name}: run `recsys test` on it, or name another metric with --metrics")
    return Score(tuple(float(run.results["metrics"][name]) for run in runs))
