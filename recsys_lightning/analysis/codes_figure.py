"""The picture of `recsys study codes`: sizes, purity and what chance would reach, by level. It needs matplotlib."""

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from recsys_lightning.analysis.codes_measures import Change
from recsys_lightning.analysis.codes_view import CodeView, LevelView
from recsys_lightning.analysis.figures import STYLES, dress, new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAME = 46  # characters a line of a run's name
_GREY = "#999999"
_DASHED = (0, (4, 3))
_PANELS = 3  # a row
_MARKS = 40  # on a line
Panel = Callable[["Axes"], None]


def codes_png(views: Sequence[CodeView], changes: Sequence[Change], level: int | None) -> bytes:
    """Sizes and purities of the level-1 codes, agreement with categories and next items by level, and changes.

    Args:
        views: of the runs.
        changes: from the first to each later one.
        level: of the categories; None leaves out what is of categories.

    Returns:
        The PNG file, 1200 pixels wide.

    Raises:
        InputError: see `require_matplotlib`.
    """
    panels: list[Panel] = [lambda axes: _sizes(axes, views)]
    if level is not None:
        if any(card.purity is not None for view in views for card in view.levels[1].cards):
            panels.append(lambda axes: _purities(axes, views, level))
        panels.append(lambda axes: _homogeneity(axes, views, level))
    if any(view.pairs for view in views):
        panels.append(lambda axes: _next(axes, views))
    if changes and all(view.levels[1].cards for view in views):
        panels.append(lambda axes: _counterparts(axes, views, changes, level))
    rows = -(-len(panels) // _PANELS)
    figure = new_figure(0.9 + 4.2 * rows + 0.15 * len(views))
    grid = list(figure.subplots(rows, _PANELS, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, draw in zip(grid, panels, strict=False):
        draw(axes)
    lines, names = grid[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=1 if len(names) > 2 else 2, fontsize=9, frameon=False)
    return png(figure)


def _sizes(axes: "Axes", views: Sequence[CodeView]) -> None:
    for view, (colour, marker) in zip(views, _styles(len(views)), strict=True):
        of = view.levels[1]
        name = "\n".join(textwrap.wrap(view.name, _NAME))
        label = f"{name}: {len(of.sizes)} of {of.possible} in use, perplexity {of.perplexity:.1f}"
        _ranked(axes, of.sizes.tolist(), colour, marker, label)
    axes.set_ylim(bottom=0)
    dress(axes, "level 1: size of each code", "code, the largest first", "items")


def _purities(axes: "Axes", views: Sequence[CodeView], level: int) -> None:
    for view, (colour, marker) in zip(views, _styles(len(views)), strict=True):
        cards = view.levels[1].cards
        purities = sorted((card.purity for card in cards if card.purity is not None), reverse=True)
        _ranked(axes, purities, colour, marker)
        found = view.levels[1].agreements[level]
        if found is not None:
            axes.axhline(found.found.purity, color=colour, linestyle=_DASHED, linewidth=1)
    found = views[0].levels[1].agreements[level]
    if found is not None:
        label = f"the largest category: {found.largest:.2f}"
        axes.axhline(found.largest, color=_GREY, linestyle=(0, (1, 2)), linewidth=1.5, label=label)
        axes.legend(fontsize=9, frameon=False, loc="lower left")
    axes.set_ylim(0, 1.03)
    dress(axes, "level 1: purity of each code\ndashed: of all items", "code, the purest first", "purity")


def _ranked(axes: "Axes", values: Sequence[float], colour: str, marker: str, label: str | None = None) -> None:
    """Values in their order, with marks that leave the line in sight however many there are."""
    step = max(1, len(values) // _MARKS)
    places = range(1, len(values) + 1)
    axes.plot(places, values, color=colour, marker=marker, markevery=step, markersize=4, linewidth=1, label=label)


def _homogeneity(axes: "Axes", views: Sequence[CodeView], level: int) -> None:
    def found(of: LevelView) -> tuple[float, float] | None:
        agreement = of.agreements[level]
        return agreement and (agreement.found.homogeneity, agreement.chance.homogeneity)

    _by_level(axes, views, found)
    axes.set_ylim(0, 1.03)
    title = f"homogeneity (categories of level {level})\ndashed: of codes dealt at random"
    dress(axes, title, "codes of level", "homogeneity")


def _next(axes: "Axes", views: Sequence[CodeView]) -> None:
    _by_level(axes, views, lambda of: of.next)
    axes.set_yscale("log")
    title = "consecutive items with the same code\ndashed: two items drawn apart"
    dress(axes, title, "codes of level", "share of pairs, log scale")


def _by_level(
    axes: "Axes", views: Sequence[CodeView], of_level: Callable[[LevelView], tuple[float, float] | None]
) -> None:
    """A line over the levels of each run, and its chance dashed; a value of 0 leaves a gap on a log scale."""
    names = list(dict.fromkeys(str(of.level) for view in views for of in view.levels.values()))
    for view, (colour, marker) in zip(views, _styles(len(views)), strict=True):
        known = {str(of.level): both for of in view.levels.values() if (both := of_level(of)) is not None}
        places = [names.index(name) for name in known]
        for values, line in zip(zip(*known.values(), strict=True), ("-", _DASHED), strict=True):
            axes.plot(places, values, color=colour, marker=marker, markersize=4, linewidth=1, linestyle=line)
    axes.set_xticks(range(len(names)), names)


def _counterparts(axes: "Axes", views: Sequence[CodeView], changes: Sequence[Change], level: int | None) -> None:
    """Each level-1 code of the first run against its counterpart in each later one: purity, or else size."""
    what = "purity" if level is not None else "items"
    first = {card.prefix[0]: getattr(card, what) for card in views[0].levels[1].cards}
    reach = max(value for value in first.values() if value is not None)
    for view, change, (colour, marker) in zip(views[1:], changes, _styles(len(views))[1:], strict=True):
        other = {card.prefix[0]: getattr(card, what) for card in view.levels[1].cards}
        points = [(first[one], other[two], shared) for one, two, shared in change.pairs]
        known = [point for point in points if None not in point]
        if not known:
            continue
        x, y, shared = (np.array(part) for part in zip(*known, strict=True))
        axes.scatter(x, y, s=8 + 120 * shared / max(shared.max(), 1), c=colour, marker=marker, alpha=0.5, linewidths=0)
        reach = max(reach, float(y.max()))
    reach = 1.0 if what == "purity" else reach
    axes.plot([0, reach], [0, reach], color=_GREY, linestyle=(0, (3, 2)), linewidth=1)
    name = "\n".join(textwrap.wrap(views[0].name, _NAME))
    title = f"level 1: {what} of a code and of its counterpart\n(areas: items in both)"
    dress(axes, title, f"in {name}", "in the other run")


def _styles(number: int) -> list[tuple[str, str]]:
    return [STYLES[at % len(STYLES)] for at in range(number)]
