"""What `recsys study tokenizers` reports: a row a tokenizer, and which cheap figure foretells recall."""

import csv
import io
from collections.abc import Sequence

from recsys_lightning.analysis.study_report import Findings, StudyTable
from recsys_lightning.analysis.study_run import Progress, StudiedRun
from recsys_lightning.analysis.study_tokenizers import (
    FIGURES,
    Bench,
    Correlation,
    Tokenized,
    correlations,
    measure,
)
from recsys_lightning.models.cobra import COBRA


def tokenizer_study(runs: Sequence[StudiedRun[COBRA]], bench: Bench, progress: Progress) -> Findings:
    """Set the tokenizers behind COBRA runs side by side.

    Args:
        runs: tested runs that differ in their semantic IDs, and in their seeds.
        bench: what is measured.
        progress: told of each step.

    Raises:
        InputError: see `measure`.
    """
    from recsys_lightning.analysis.study_tokenizers_figure import tokenizers_png

    rows = sorted(measure(runs, bench, progress), key=lambda row: -row.scores[bench.metrics[0]].mean)
    found = correlations(rows, bench.metrics[0])
    head = ["tokenizer", "class", "codes", *bench.metrics, *(figure.heading for figure in FIGURES)]
    return Findings(
        title="Tokenizers: what their codes look like, and what COBRA makes of them",
        introduction=_introduction(bench),
        tables=[
            StudyTable("Tokenizers, the best first", head, [_cells(row, bench) for row in rows]),
            StudyTable("Perplexity of each level", *_levels(rows)),
            StudyTable(f"Does it foretell {bench.metrics[0]}?", *_correlation_table(found)),
        ],
        remarks=_remarks(rows, bench),
        pictures={".png": tokenizers_png(rows, found, bench.metrics[0])},
        files={".csv": _csv(rows, bench), "-correlations.csv": _correlations_csv(found)},
        settings={
            "tokenizers": str(len(rows)),
            "metrics": ", ".join(bench.metrics),
            "categories": f"{bench.field}, level {bench.level}" if bench.field else "none",
        },
    )


def _introduction(bench: Bench) -> list[str]:
    parts = [
        "One row a tokenizer; the recommender is the same in all but its semantic IDs, and its metrics are those of "
        "the test items, all items ranked, exact item ids. *CPU seconds* are those of the tokenizer's whole fit, the "
        "embedding of texts left out. *Unique items* share their codes with no other item. *Reconstruction error* is "
        "the share of the embeddings' spread that a tokenizer's own codes lose, before any policy of collisions. "
        "*Next-item agreement* is how often two consecutive training items of a user have the same level-1 code, over "
        "how often two items drawn by their popularity would; *next-item NMI* is the normalised mutual information of "
        "the two codes."
    ]
    if bench.field is not None:
        parts.append(f"Categories are those of level {bench.level} of `{bench.field}`, beside level-1 codes.")
    parts.append(
        "The correlation is Spearman's, over tokenizers: with so few of them, only a strong one says anything, and "
        "none says that the figure is the cause."
    )
    return parts


def _cells(row: Tokenized, bench: Bench) -> list[str]:
    policy = "" if row.collisions == "none" else f", {row.collisions}"
    metrics = []
    for metric in bench.metrics:
        score = row.scores[metric]
        metrics.append(f"{score.mean:.4f}" + (f" ± {score.sd:.4f}" if score.sd is not None else ""))
    return [
        row.name,
        f"{row.made_by}{policy}",
        f"{row.levels} x {row.num_codes}",
        *metrics,
        *(_number(figure.value(row), figure.decimals) for figure in FIGURES),
    ]


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:,.{decimals}f}"


def _levels(rows: Sequence[Tokenized]) -> tuple[list[str], list[list[str]]]:
    most = max(row.levels for row in rows)
    head = ["tokenizer", "codes a level", *(f"level {level + 1}" for level in range(most))]
    body = []
    for row in rows:
        values = [f"{value:.1f}" for value in row.report.perplexity]
        body.append([row.name, str(row.num_codes), *values, *["-"] * (most - row.levels)])
    return head, body


def _correlation_table(found: Sequence[Correlation]) -> tuple[list[str], list[list[str]]]:
    body = [
        [one.figure, "-" if one.rho is None else f"{one.rho:+.2f}", _number(one.p, 3), str(one.tokenizers)]
        for one in found
    ]
    return ["figure", "rho", "p", "tokenizers"], body


def _remarks(rows: Sequence[Tokenized], bench: Bench) -> list[str]:
    remarks = []
    if all(row.nmi is None for row in rows) and bench.field is not None:
        remarks.append(f"The catalogue has no field `{bench.field}`: nothing is said of categories.")
    if lacking := [row.name for row in rows if row.cpu_seconds is None]:
        remarks.append(f"No CPU time is known of {', '.join(lacking)}: no run stands behind the table.")
    return remarks


def _csv(rows: Sequence[Tokenized], bench: Bench) -> bytes:
    head = ["tokenizer", "class", "collisions", "levels", "codes", "seeds", *bench.metrics]
    head += [figure.heading for figure in FIGURES]
    lines = []
    for row in rows:
        scores = [row.scores[metric] for metric in bench.metrics]
        first = [row.name, row.made_by, row.collisions, row.levels, row.num_codes, len(scores[0].values)]
        lines.append([*first, *(score.mean for score in scores), *(figure.value(row) for figure in FIGURES)])
    return _written(head, lines)


def _correlations_csv(found: Sequence[Correlation]) -> bytes:
    return _written(list(Correlation._fields), found)


def _written(head: Sequence[str], lines: Sequence[Sequence[object]]) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return file.getvalue().encode()
