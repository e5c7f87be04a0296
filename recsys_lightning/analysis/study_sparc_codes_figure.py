"""The picture of level-1 codes: how large and how pure they are, and what became of them. It needs matplotlib."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from recsys_lightning.analysis.figures import STYLES, dress, new_figure, png
from recsys_lightning.analysis.study_sparc_codes import Change

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from recsys_lightning.analysis.study_sparc_codes_tables import CodeView

_NAME = 46  # characters a line of a run's name


def codes_png(views: "Sequence[CodeView]", changes: Sequence[Change], level: int | None) -> bytes:
    """Sizes of the codes by rank, their purities by rank, and, of two or more runs, each code against its counterpart.

    Args:
        views: of the runs.
        changes: from the first to each later one.
        level: of the categories that the purities are of; None leaves purity out.

    Returns:
        The PNG file, 1200 pixels wide.

    Raises:
        InputError: see `require_matplotlib`.
    """
    panels = 1 + (level is not None) + bool(changes)
    figure = new_figure(5.4)
    grid = list(figure.subplots(1, max(panels, 2), squeeze=False).flat)
    for axes in grid[panels:]:
        axes.set_visible(False)
    _sizes(grid[0], views)
    if level is not None:
        _purities(grid[1], views, level)
    if changes:
        _counterparts(grid[panels - 1], views, changes, level)
    figure.suptitle("Codes of level 1", fontsize=13)
    lines, names = grid[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=1 if len(names) > 2 else 2, fontsize=9, frameon=False)
    return png(figure)


def _sizes(axes: "Axes", views: "Sequence[CodeView]") -> None:
    for view, (colour, marker) in zip(views, _styles(len(views)), strict=True):
        sizes = [card.items for card in view.cards]  # the largest first
        name = "\n".join(textwrap.wrap(view.name, _NAME))
        label = f"{name}: {len(sizes)} of {view.num_codes} in use, perplexity {view.perplexity:.1f}"
        axes.plot(range(1, len(sizes) + 1), sizes, color=colour, marker=marker, markersize=4, linewidth=1, label=label)
    axes.set_ylim(bottom=0)
    dress(axes, "size of each code", "code, the largest first", "items")


def _purities(axes: "Axes", views: "Sequence[CodeView]", level: int) -> None:
    for view, (colour, marker) in zip(views, _styles(len(views)), strict=True):
        purities = sorted((card.purity for card in view.cards if card.purity is not None), reverse=True)
        axes.plot(range(1, len(purities) + 1), purities, color=colour, marker=marker, markersize=4, linewidth=1)
        found = view.agreements[level]
        if found is not None:
            axes.axhline(found.purity, color=colour, linestyle=(0, (4, 3)), linewidth=1)
    found = views[0].agreements[level]
    if found is not None:
        label = f"the largest category: {found.largest:.2f}"
        axes.axhline(found.largest, color="#999999", linestyle=(0, (1, 2)), linewidth=1.5, label=label)
        axes.legend(fontsize=9, frameon=False, loc="lower left")
    axes.set_ylim(0, 1.03)
    dress(axes, f"purity of each code, dashed: of all items (level {level})", "code, the purest first", "purity")


def _counterparts(axes: "Axes", views: "Sequence[CodeView]", changes: Sequence[Change], level: int | None) -> None:
    """Each code of the first run against its counterpart in each later one: purity, or else size."""
    what = "purity" if level is not None else "items"
    first = {card.code: getattr(card, what) for card in views[0].cards}
    reach = max(value for value in first.values() if value is not None)
    for view, change, (colour, marker) in zip(views[1:], changes, _styles(len(views))[1:], strict=True):
        other = {card.code: getattr(card, what) for card in view.cards}
        points = [(first[one], other[two], shared) for one, two, shared in change.pairs]
        x, y, shared = (np.array(part) for part in zip(*(p for p in points if None not in p), strict=True))
        axes.scatter(x, y, s=8 + 120 * shared / max(shared.max(), 1), c=colour, marker=marker, alpha=0.5, linewidths=0)
        reach = max(reach, float(y.max()))
    reach = 1.0 if what == "purity" else reach
    axes.plot([0, reach], [0, reach], color="#999999", linestyle=(0, (3, 2)), linewidth=1)
    name = "\n".join(textwrap.wrap(views[0].name, _NAME))
    dress(axes, f"{what} of a code and of its counterpart", f"in {name}", "in the other run")
    axes.set_title(f"{what} of a code and of its counterpart\n(areas: items in both)", fontsize=11)


def _styles(number: int) -> list[tuple[str, str]]:
    return [STYLES[at % len(STYLES)] for at in range(number)]
