"""Pictures of the latency lab. They need matplotlib, the extra ``plots``."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from recsys_lightning.analysis.figures import DPI, WIDTH, dress, png, require_matplotlib
from recsys_lightning.analysis.latency_plan import Cell
from recsys_lightning.analysis.latency_report import operating_points, shown_cells, shown_interests

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 4.2  # inches of a row of panels
# Okabe and Ito's palette, which the colour-blind can tell apart; the marker says the same once more.
_STYLES = {"exact": ("#000000", "s"), "ivf": ("#0072B2", "o"), "hnsw": ("#D55E00", "^")}
_ON_GPU = {"exact": ("#009E73", "D"), "ivf": ("#CC79A7", "v"), "hnsw": ("#E69F00", "P")}


def latency_png(cells: Sequence[Cell]) -> bytes:
    """p50 and p99 of one user's search against his number of interests: a panel a catalogue, a colour an index.

    Returns:
        The PNG file, 1200 pixels wide.

    Raises:
        InputError: see `require_matplotlib`.
    """
    figure, panels = _panels([cell.items for cell in cells])
    for items, axes in panels.items():
        here = [cell for cell in shown_cells(cells) if cell.items == items and cell.p50_ms is not None]
        for line in _lines(here):
            colour, marker = _style(line[0])
            p50 = [(cell.interests, cell.p50_ms) for cell in line if cell.p50_ms is not None]
            p99 = [(cell.interests, cell.p99_ms) for cell in line if cell.p99_ms is not None]
            label = f"{_label(line[0])} {line[0].parameters}".strip()
            axes.plot(*_xy(p50), color=colour, marker=marker, markersize=5, label=label)
            axes.plot(*_xy(p99), color=colour, marker=marker, markersize=5, fillstyle="none", linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.minorticks_off()
        numbers = sorted({cell.interests for cell in here})
        axes.set_xticks(numbers, [str(number) for number in numbers])
        _log_ticks(axes, "y", [value for cell in here for value in (cell.p50_ms, cell.p99_ms) if value is not None])
        _dress(axes, f"{items:,} items", "K, interest queries of the user", "ms")
    figure.suptitle("Search for one user at a time: all his queries and the merge", fontsize=13)
    from matplotlib.lines import Line2D

    full = Line2D([], [], color="#555555", marker="o", markersize=5, label="p50")
    hollow = Line2D([], [], color="#555555", marker="o", markersize=5, label="p99", linestyle="--", fillstyle="none")
    figure.legend(handles=[full, hollow], loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return png(figure)


def recall_png(cells: Sequence[Cell]) -> bytes:
    """Recall against the p50 of one user's search at one number of interests: a panel a catalogue, a colour an index.

    Returns:
        The PNG file, 1200 pixels wide.

    Raises:
        InputError: see `require_matplotlib`.
    """
    at, chosen = shown_interests(cells), operating_points(cells)
    figure, panels = _panels([cell.items for cell in cells])
    for items, axes in panels.items():
        here = [cell for cell in cells if (cell.items, cell.interests) == (items, at) and cell.p50_ms is not None]
        for line in _lines(here):
            colour, marker = _style(line[0])
            points = {cell.parameters: (cell.p50_ms or 0.0, cell.recall or 0.0) for cell in line}
            first, last = line[0].parameters, line[-1].parameters.partition("=")[2]
            label = f"{_label(line[0])} {first.replace('=', ' ')} to {last}" if last else _label(line[0])
            axes.plot(*_xy(points.values()), color=colour, marker=marker, markersize=6, label=label)
            ring = points[chosen[items, line[0].device, line[0].index]]
            axes.plot(*_xy([ring]), marker="o", color=colour, fillstyle="none", markersize=13)
        axes.set_xscale("log")
        axes.minorticks_off()
        _log_ticks(axes, "x", [cell.p50_ms for cell in here if cell.p50_ms is not None])
        _dress(axes, f"{items:,} items", "p50, ms", "recall of the exact list")
    figure.suptitle(f"Recall and latency at K={at}, one user at a time", fontsize=13)
    from matplotlib.lines import Line2D

    ring_mark = Line2D([], [], color="#555555", marker="o", markersize=13, linestyle="none", fillstyle="none")
    ring_mark.set_label("the parameter that the tables of costs show")
    figure.legend(handles=[ring_mark], loc="outside lower center", fontsize=9, frameon=False)
    return png(figure)


def _lines(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each index and device."""
    lines: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        lines.setdefault((cell.device, cell.index), []).append(cell)
    return list(lines.values())


def _xy(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    points = list(points)
    return [x for x, _ in points], [y for _, y in points]


def _panels(sizes: Iterable[int]) -> tuple["Figure", dict[int, "Axes"]]:
    """A figure with a panel a size of catalogue."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted(set(sizes))
    columns = 3 if len(names) in (3, 5, 6) else min(len(names), 2)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH, rows * PANEL + 1.0), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    return figure, dict(zip(names, grid, strict=False))


def _style(cell: Cell) -> tuple[str, str]:
    """Colour and marker."""
    return (_STYLES if cell.device == "cpu" else _ON_GPU)[cell.index]


def _label(cell: Cell) -> str:
    return cell.index if cell.device == "cpu" else f"{cell.index} ({cell.device})"


def _log_ticks(axes: "Axes", which: str, values: Sequence[float]) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, or at powers of ten alone where the values span many."""
    if not values:
        return
    low, high = min(values) / 1.3, max(values) * 1.3
    steps = (1, 2, 5) if high / low < 3000 else (1,)
    ticks = [step * 10.0**power for power in range(-6, 9) for step in steps if low <= step * 10.0**power <= high]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])


def _dress(axes: "Axes", title: str, x: str, y: str) -> None:
    dress(axes, title, x, y)
    if axes.get_legend_handles_labels()[0]:  # below the panel, where it covers no line
        place = (0.5, -0.14)
        axes.legend(
            loc="upper center",
            bbox_to_anchor=place,
            ncols=3,
            fontsize=9,
            frameon=False,
            handlelength=1.5,
            columnspacing=1,
        )
