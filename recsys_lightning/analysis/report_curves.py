"""Learning curves, the balance of the loss terms, and the gradients that they send to the codebooks."""

import re
from collections.abc import Mapping, Sequence

from recsys_lightning.analysis.report_blocks import Block, Plot, Section
from recsys_lightning.analysis.report_figures import Line, line_figure, share_figure
from recsys_lightning.analysis.report_sources import Source

_GRADIENT = re.compile(r"gradient/(.+)@(\d+)")
_COLUMNS = {"val": 0, "val-unseen": 1}  # and their dashes


def learning_curves(sources: Mapping[str, Source], k: int | None) -> Section:
    """Losses of training and metrics of validation by step, all runs in one plot each.

    Args:
        sources: runs by the names they are shown under.
        k: cut-off of recall and NDCG; None for runs without.
    """
    plots: list[Block] = []
    add = _Adder(sources, plots)
    add("Training loss", {"train/loss": 0}, "loss", "The sum of all weighted terms.")
    if k is not None:
        note = "Dashed: without the items that a user has met."
        for kind in ("recall", "ndcg"):
            add(
                f"Validation {kind}@{k}",
                {f"{column}/{kind}@{k}": dash for column, dash in _COLUMNS.items()},
                kind,
                note,
            )
    add("Validation loss", {"val/loss": 0}, "loss", "Of tokenizers: the sum of all weighted terms.")
    return Section("curves", "Learning curves", plots, "metrics.csv holds no curves: nothing was logged.")


class _Adder:
    """Adds a plot of some columns of all runs, if any run has them."""

    def __init__(self, sources: Mapping[str, Source], plots: list[Block]) -> None:
        self.sources, self.plots = sources, plots

    def __call__(self, title: str, columns: Mapping[str, int], y: str, note: str) -> None:
        lines = []
        for style, (name, source) in enumerate(self.sources.items()):
            for column, dash in columns.items():
                steps, values = source.curve(column)
                if steps:
                    shown = f"{name}, unseen" if "-unseen/" in column else name
                    lines.append(Line(shown, steps, values, style, dash, listed="-unseen/" not in column))
        if lines:
            self.plots.append(Plot(title, line_figure(lines, "step", y), note))


def loss_balance(sources: Mapping[str, Source]) -> Section:
    """What share of the loss each term has, and how hard each pulls at the codebooks, a plot a run and a level."""
    plots: list[Block] = []
    for name, source in sources.items():
        of = f", {name}" if len(sources) > 1 else ""
        terms = loss_terms(source)
        if len(terms) > 1:
            steps, shares = term_shares(source, terms)
            lines = [Line(term, steps, shares[term], style) for style, term in enumerate(terms)]
            note = "Share of each weighted term in the sum of their sizes, mean of an epoch."
            plots.append(Plot(f"Loss terms{of}", share_figure(lines, "step", "share"), note))
        plots += _gradients(of, source)
    missing = "No run logs more than one loss term, and none measures gradients on codebooks."
    return Section("balance", "Loss terms and gradients", plots, missing)


def loss_terms(source: Source) -> list[str]:
    """The terms of a run's objective that were logged."""
    names = (name.removeprefix("train/") for name in source.metrics.columns if name.startswith("train/"))
    return [name for name in names if name != "loss" and source.curve(f"train/{name}")[0]]


def term_shares(source: Source, terms: Sequence[str]) -> tuple[list[float], dict[str, list[float]]]:
    """Steps at which any term was logged, and |term| / sum of |terms| there; a term not logged there counts as 0."""
    curves = {term: dict(zip(*source.curve(f"train/{term}"), strict=True)) for term in terms}
    steps = sorted({step for curve in curves.values() for step in curve})
    sizes = {term: [abs(curve.get(step, 0.0)) for step in steps] for term, curve in curves.items()}
    totals = [sum(column) or 1.0 for column in zip(*sizes.values(), strict=True)]
    shares = {term: [size / total for size, total in zip(row, totals, strict=True)] for term, row in sizes.items()}
    return steps, shares


def _gradients(of: str, source: Source) -> list[Block]:
    """A plot a level; terms that never reach a codebook would have no place on a logarithmic axis and are named."""
    found: dict[int, list[str]] = {}
    for column in source.metrics.columns:
        if named := _GRADIENT.fullmatch(column):
            found.setdefault(int(named[2]), []).append(named[1])
    plots: list[Block] = []
    for level, terms in sorted(found.items()):
        lines, idle = [], []
        for style, term in enumerate(terms):
            steps, values = source.curve(f"gradient/{term}@{level}")
            positive = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0]
            if positive:
                lines.append(
                    Line(term, [at for at, _ in positive], [value for _, value in positive], style, style // 7)
                )
            elif steps:
                idle.append(term)
        if lines:
            note = "Norm of each weighted term's gradient on this level's codewords, mean of an epoch."
            note += f" Always 0: {', '.join(idle)}." if idle else ""
            figure = line_figure(lines, "step", "gradient norm", log_y=True)
            plots.append(Plot(f"Gradients on level {level}{of}", figure, note))
    return plots
