"""Pictures of item vectors by semantic ID (COBRA, Figures 4 and 5). They need matplotlib, the extra ``plots``."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from recsys_lightning.analysis.figures import new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMED = 12  # codes of level 1 that are named in a map: the largest
_NEIGHBOURS = 200  # items to which the middle of a code is near
_MIN_BLOCK = 0.03  # share of the items below which a code is not named on an axis


def heat_png(views: Sequence[tuple[str, Tensor]], level1: Tensor) -> bytes:
    """Cosines of items with items, and by how much each other run's are above the first's.

    Args:
        views: name and unit vectors (n, D) of each run, items in the order of their semantic IDs.
        level1: (n,) their first codes.

    Returns:
        The PNG file, 1200 pixels wide.

    Raises:
        InputError: see `require_matplotlib`.
    """
    cosines = [(vectors @ vectors.T).numpy() for _, vectors in views]
    panels = [(name, values, False) for (name, _), values in zip(views, cosines, strict=True)]
    for (name, _), values in zip(views[1:], cosines[1:], strict=True):
        panels.append((f"{views[0][0]} less {name}", cosines[0] - values, True))
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = new_figure(rows * (12.0 / max(columns, 2) * 0.95) + 0.8)
    figure.set_layout_engine("compressed")  # the panels are squares
    apart = ~np.eye(len(level1), dtype=bool)  # an item's cosine with itself would stretch the scale
    low, high = np.quantile(np.concatenate([values[apart] for values in cosines]), (0.01, 0.99))
    differences = [np.abs(values[apart]) for _, values, differs in panels if differs]
    reach = float(np.quantile(np.concatenate(differences), 0.99)) if differences else 1.0
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    images = {}
    for axes, (name, values, differs) in zip(grid, panels, strict=False):
        if differs:
            images["difference"] = axes.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="none")
        else:
            images["cosine"] = axes.imshow(values, cmap="viridis", vmin=low, vmax=high, interpolation="none")
        _mark_blocks(axes, level1.numpy(), "#000000" if differs else "#ffffff")
        axes.set_title("\n".join(textwrap.wrap(name, 44)), fontsize=11, parse_math=False)
    shown = grid[: len(panels)]
    for label, image in images.items():
        of = [axes for axes, panel in zip(shown, panels, strict=True) if panel[2] == (label == "difference")]
        figure.colorbar(image, ax=of, shrink=0.8, label=label, extend="both")
    figure.suptitle("Cosines of items, ordered by semantic ID", fontsize=13)
    return png(figure)


def _mark_blocks(axes: "Axes", level1: np.ndarray, colour: str) -> None:
    """Lines between the codes of level 1, and the names of the larger ones."""
    starts = np.flatnonzero(np.diff(level1, prepend=level1[0] - 1))
    stops = np.append(starts[1:], len(level1))
    for start in starts[1:]:
        axes.axhline(start - 0.5, color=colour, linewidth=0.4, alpha=0.5)
        axes.axvline(start - 0.5, color=colour, linewidth=0.4, alpha=0.5)
    large = [(int(a), int(b)) for a, b in zip(starts, stops, strict=True) if b - a >= _MIN_BLOCK * len(level1)]
    middles, names = [(a + b - 1) / 2 for a, b in large], [str(level1[a]) for a, _ in large]
    axes.set_xticks(middles, names, fontsize=8)
    axes.set_yticks(middles, names, fontsize=8)
    axes.set_xlabel("code of level 1", fontsize=10)


def map_png(maps: Sequence[tuple[str, Tensor]], level1: Tensor) -> bytes:
    """The items of each run on a plane, a colour a code of level 1; the largest codes are named.

    Args:
        maps: name and places (n, 2) of each run.
        level1: (n,) first codes of the items.

    Returns:
        The PNG file, 1200 pixels wide.

    Raises:
        InputError: see `require_matplotlib`.
    """
    columns = min(len(maps), 2)
    rows = -(-len(maps) // columns)
    figure = new_figure(rows * 12.0 / max(columns, 1.6) + 0.8)
    from matplotlib import colormaps

    codes, of_code = np.unique(level1.numpy(), return_inverse=True)
    palette = [colour for name in ("tab20", "tab20b", "tab20c") for colour in colormaps[name].colors]  # type: ignore[attr-defined]
    colours = np.array([palette[number % len(palette)] for number in range(len(codes))])
    named = np.bincount(of_code).argsort()[::-1][:_NAMED]
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(maps) :]:
        axes.set_visible(False)
    for axes, (name, places) in zip(grid, maps, strict=False):
        points = places.numpy()
        axes.scatter(points[:, 0], points[:, 1], s=7, c=colours[of_code], linewidths=0)
        for number in named:
            here = points[of_code == number]
            middle = np.linalg.norm(here[:, None] - here[None, :_NEIGHBOURS], axis=2).mean(1).argmin()
            x, y = here[middle]  # of an item, since codes may lie in several places
            label = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colours[number], "alpha": 0.85}
            axes.text(x, y, str(codes[number]), fontsize=8, ha="center", va="center", bbox=label)
        axes.set_title("\n".join(textwrap.wrap(name, 60)), fontsize=11, parse_math=False)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[["top", "right", "bottom", "left"]].set_color("#cccccc")
    shown = "" if len(codes) <= _NAMED else f"; the {_NAMED} most frequent are named"
    figure.suptitle(f"t-SNE of item vectors, a colour a code of level 1{shown}", fontsize=13)
    return png(figure)
