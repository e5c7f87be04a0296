"""The picture of soft search over its temperature. It needs matplotlib, the extra ``plots``."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from recsys_lightning.analysis.figures import STYLES, dress, new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from recsys_lightning.analysis.study_sparc_temperature import Measured, TemperatureGrid

_MARGIN = 2.5  # the limits stand so many times below the lowest and above the highest temperature


def temperature_png(found: "Sequence[Measured]", grid: "TemperatureGrid") -> bytes:
    """A panel a measure over the temperature, a line a merge; then recall against intra-list distance.

    Lists are whole. Bands are one standard deviation over seeds to either side. Without intra-list distance its two
    panels show the lists without the items that a user has met.

    Returns:
        The PNG file, 1200 pixels wide.

    Raises:
        InputError: see `require_matplotlib`.
    """
    k = grid.k
    distance = f"/intra-list-distance@{k}"
    shown = {
        f"/recall@{k}": f"recall@{k}",
        f"/ndcg@{k}": f"ndcg@{k}",
        f"/coverage@{k}": f"coverage@{k}",
        f"/distinct-codes@{k}": f"different level-1 codes among {k}",
    }
    if all(distance in measured.scores for measured in found):
        shown[distance] = f"intra-list distance@{k}"
    else:
        shown |= {f"-unseen/recall@{k}": f"unseen recall@{k}", f"-unseen/ndcg@{k}": f"unseen ndcg@{k}"}
    figure = new_figure(7.8)
    panels = list(figure.subplots(2, 3).flat)
    for axes, (name, title) in zip(panels, shown.items(), strict=False):
        _over_temperature(axes, found, grid, name, title)
    if distance in shown:
        _trade_off(panels[5], found, grid, distance)
    seeds = len(next(iter(found[0].scores.values())).values)
    bands = f"; bands: standard deviation over {seeds} seeds" if seeds > 1 else ""
    figure.suptitle(f"Soft search over its temperature ({grid.stage} users{bands})", fontsize=13)
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    return png(figure)


def _over_temperature(
    axes: "Axes", found: "Sequence[Measured]", grid: "TemperatureGrid", name: str, title: str
) -> None:
    low, high = min(grid.temperatures) / _MARGIN, max(grid.temperatures) * _MARGIN
    scores = {measured.point: measured.scores[name] for measured in found}
    alone = next(score for point, score in scores.items() if point.merge == "-")
    for merge, (colour, marker) in zip(grid.merges, STYLES, strict=False):
        points = [(point.temperature, score) for point, score in scores.items() if point.merge == merge]
        points = sorted([(0.0, alone), *points], key=lambda pair: pair[0])
        x = [min(max(temperature, low), high) for temperature, _ in points]
        mean = [score.mean for _, score in points]
        axes.plot(x, mean, color=colour, marker=marker, markersize=5, linewidth=1.4, label=merge)
        sd = [score.sd or 0.0 for _, score in points]
        if any(sd):
            below, above = ([m + side * s for m, s in zip(mean, sd, strict=True)] for side in (-1, 1))
            axes.fill_between(x, below, above, color=colour, alpha=0.15, linewidth=0)
    for point, score in scores.items():
        if point.merge == "max":
            style = (0, (4, 3))
            axes.axhline(score.mean, color="#777777", linestyle=style, linewidth=1.2, label="max, without weights")
    own = next((measured.point for measured in found if measured.own), None)
    if own is not None and math.isfinite(own.temperature):
        label = f"the run's own: {own.merge}, {own.temperature:g}"
        axes.axvline(own.temperature, color="#999999", linestyle=(0, (1, 2)), linewidth=1.4, label=label)
    axes.set_xscale("log")
    dress(axes, title, "temperature", "")
    inner = [t for t in (0.01, 0.1, 1, 10, 100) if low * 1.5 < t < high / 1.5]
    axes.set_xticks([low, *inner, high], ["top-1", *(f"{t:g}" for t in inner), "uniform"])
    axes.minorticks_off()


def _trade_off(axes: "Axes", found: "Sequence[Measured]", grid: "TemperatureGrid", distance: str) -> None:
    """Recall over intra-list distance: each line leads from top-1 to uniform."""
    recall = f"/recall@{grid.k}"
    for merge, (colour, marker) in zip(grid.merges, STYLES, strict=False):
        mine = [measured for measured in found if measured.point.merge in (merge, "-")]
        mine.sort(key=lambda measured: measured.point.temperature)
        x, y = ([measured.scores[name].mean for measured in mine] for name in (distance, recall))
        axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1, alpha=0.8)
    for measured in found:
        if measured.point.merge in ("-", "max"):
            place = measured.scores[distance].mean, measured.scores[recall].mean
            name = "top-1" if measured.point.merge == "-" else "max"
            axes.plot(*place, marker="*", markersize=10, color="#333333")
            axes.annotate(name, place, textcoords="offset points", xytext=(6, -10), fontsize=9)
    axes.locator_params(axis="x", nbins=5)
    dress(axes, "recall against distance", f"intra-list distance@{grid.k}", f"recall@{grid.k}")
