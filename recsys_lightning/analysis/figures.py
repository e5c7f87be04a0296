"""Pictures of comparisons. They need matplotlib, the extra ``plots``."""

import importlib.util
import io
import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from recsys_lightning.analysis.compare import Row
from recsys_lightning.analysis.groups import Score
from recsys_lightning.analysis.paired import Interval, Key
from recsys_lightning.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, DPI = 12.0, 100  # inches and dots per inch: 1200 pixels
# Okabe and Ito's palette, which the colour-blind can tell apart; the marker says the same once more.
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#000000", "v"),
    ("#E69F00", "P"),
    ("#56B4E9", "X"),
)
_ALL = ("#0072B2", "o", -1)  # colour, marker, side of the line (down is +1)
_UNSEEN = ("#D55E00", "s", 1)
_DASHED = (0, (3, 1.5))
_LABEL = 34  # characters a line of a name on the y axis


def require_matplotlib() -> None:
    """Nothing, if pictures can be drawn.

    Raises:
        InputError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('pictures need matplotlib: pip install "recsys_lightning[plots]"')


def new_figure(height: float) -> "Figure":
    """An empty figure of the project's width and of such a height in inches.

    Raises:
        InputError: see `require_matplotlib`.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    return figure


def dress(axes: "Axes", title: str, x: str, y: str) -> None:
    """Titles and grid of a panel."""
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: "Figure") -> bytes:
    """The PNG file of a figure; the same figure gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


def comparison_png(
    title: str,
    table: Sequence[Row],
    metrics: Sequence[str],
    intervals: Mapping[Key, Interval],
) -> bytes:
    """A picture of a comparison, 1200 pixels wide: a panel a metric, a line a row, a dot for its mean.

    Bars are the intervals over users where there are such, else one standard deviation over seeds to either side.
    Small dots are single seeds, hollow diamonds printed numbers.

    Args:
        title: above the panels.
        table: rows of the comparison, printed ones included.
        metrics: of the rows.
        intervals: over users, by name of the row, split and metric.

    Returns:
        The PNG file.

    Raises:
        InputError: see `require_matplotlib`.
    """
    require_matplotlib()
    table = [row for row in table if any(row.scores)]
    lines = list(dict.fromkeys((row.name, row.model) for row in table))
    printed = {(row.name, row.model) for row in table if row.num_runs is None}
    names = [f"{line[1]} (paper)" if line in printed else _wrapped(line[0]) for line in lines]
    heights = [max(0.45, 0.14 + 0.17 * (1 + name.count("\n"))) for name in names]  # inches, as is the y axis
    edges = [0.0, *itertools.accumulate(heights)]
    middles = dict(zip(lines, (edge + height / 2 for edge, height in zip(edges, heights, strict=False)), strict=True))
    columns = min(len(metrics), 2)
    panels = -(-len(metrics) // columns)
    height = panels * (0.6 + edges[-1]) + 1.4
    figure = new_figure(height)
    for at, axes in enumerate(figure.subplots(panels, columns, squeeze=False, sharey=True).flat):
        if at >= len(metrics):
            axes.set_visible(False)
            continue
        for row in table:
            if score := row.scores[at]:
                interval = intervals.get((row.name, row.split, metrics[at]))
                _draw(axes, middles[row.name, row.model], row, score, interval)
        _dress(axes, metrics[at], names, list(middles.values()), edges)
    figure.suptitle("\n".join(textwrap.wrap(title, 90)), fontsize=13, parse_math=False)
    _legend(figure, table, metrics, intervals)
    return png(figure)


def _wrapped(name: str) -> str:
    """A name on lines that fit, broken after `/`, `_` and `-`, or anywhere where there is none of them."""
    lines = [""]
    for part in re.findall(rf"[^/_-]{{0,{_LABEL - 1}}}[/_-]|[^/_-]{{1,{_LABEL}}}", name):
        if len(lines[-1]) + len(part) > _LABEL:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _draw(axes: "Axes", middle: float, row: Row, score: Score, interval: Interval | None) -> None:
    """The marks of one row in one panel."""
    if row.num_runs is None:
        axes.plot(score.mean, middle, marker="D", markersize=8, color="#333333", fillstyle="none", linestyle="none")
        return
    colour, marker, side = _UNSEEN if row.split.endswith("-unseen") else _ALL
    y = middle + 0.075 * side
    if interval is not None:
        axes.plot((interval.low, interval.high), (y, y), color=colour, linewidth=2, solid_capstyle="butt")
    elif score.sd is not None:
        low, high = score.mean - score.sd, score.mean + score.sd
        axes.plot((low, high), (y, y), color=colour, linewidth=1.2, linestyle=_DASHED)
    if len(score.values) > 1:
        seeds = [y + 0.08 * side] * len(score.values)
        axes.plot(score.values, seeds, marker=marker, markersize=3, color=colour, alpha=0.6, linestyle="none")
    axes.plot(score.mean, y, marker=marker, markersize=7, color=colour, linestyle="none")


def _dress(axes: "Axes", metric: str, names: Sequence[str], middles: Sequence[float], edges: Sequence[float]) -> None:
    """Title, names and grid of a panel."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(metric, fontsize=11, parse_math=False)
    axes.set_yticks(middles, names, fontsize=9, parse_math=False)
    axes.set_ylim(edges[-1], edges[0])  # the first row on top
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    axes.tick_params(axis="x", labelsize=9)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for edge in edges[1:-1]:
        axes.axhline(edge, color="#eeeeee", linewidth=0.8, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _legend(figure: "Figure", table: Sequence[Row], metrics: Sequence[str], intervals: Mapping[Key, Interval]) -> None:
    """Below the panels: what the marks and bars that occur stand for."""
    from matplotlib.lines import Line2D

    cells = [
        ((row.name, row.split, metric) in intervals, row, score)
        for row in table
        for metric, score in zip(metrics, row.scores, strict=True)
        if score and row.num_runs is not None
    ]
    marks = []
    for (colour, marker, _), unseen, text in (
        (_ALL, False, "all items"),
        (_UNSEEN, True, "items the user has not met"),
    ):
        if any(row.split.endswith("-unseen") == unseen for _, row, _ in cells):
            marks.append(Line2D([], [], color=colour, marker=marker, markersize=7, linestyle="none", label=text))
    grey = "#777777"
    if any(score.sd is not None for _, _, score in cells):
        marks.append(Line2D([], [], color=grey, marker="o", markersize=3, linestyle="none", label="a single seed"))
    if any(over_users for over_users, _, _ in cells):
        marks.append(Line2D([], [], color=grey, linewidth=2, label="95 % bootstrap interval over users"))
    if any(score.sd is not None and not over_users for over_users, _, score in cells):
        label = "± standard deviation over seeds, where there are no ranks of users"
        marks.append(Line2D([], [], color=grey, linewidth=1.2, linestyle=_DASHED, label=label))
    if any(row.num_runs is None for row in table):
        hollow = Line2D([], [], color="#333333", marker="D", markersize=8, fillstyle="none", linestyle="none")
        hollow.set_label("printed in the paper, all items")
        marks.append(hollow)
    columns = -(-len(marks) // (1 if len(marks) < 4 else 2))
    figure.legend(handles=marks, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
