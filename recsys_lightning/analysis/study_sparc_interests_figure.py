"""The picture of soft search over the number of interests. It needs matplotlib, the extra ``plots``."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from recsys_lightning.analysis.figures import STYLES, dress, new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from recsys_lightning.analysis.study_sparc_interests import InterestGrid, InterestRow, InterestsFound
    from recsys_lightning.metrics.calibration import Reliability

_NAME = 60  # characters a line of a name


def interests_png(found: "InterestsFound", grid: "InterestGrid", unit: str) -> bytes:
    """Recall, tail recall, coverage, cost and accuracy over K, a line a group of runs; and how calibrated the tower is.

    Bars are one standard deviation over seeds to either side.

    Args:
        found: what was measured.
        grid: of the study.
        unit: of the cost.

    Returns:
        The PNG file, 1200 pixels wide.

    Raises:
        InputError: see `require_matplotlib`.
    """
    k = grid.k
    groups: dict[str, list[InterestRow]] = {}
    for row in found.rows:
        groups.setdefault(row.group, []).append(row)
    shown = {
        f"/recall@{k}": f"recall@{k}, all items",
        f"/tail/recall@{k}": f"tail recall@{k}, all items",
        f"/coverage@{k}": f"coverage@{k}",
        "ms": f"{unit} a user, asked alone",
        "accuracy": "answer's code among the K",
    }
    figure = new_figure(7.8)
    panels = list(figure.subplots(2, 3).flat)
    for axes, (name, title) in zip(panels, shown.items(), strict=False):
        for (group, rows), (colour, marker) in zip(groups.items(), _styles(len(groups)), strict=True):
            points = [(row.number, row.scores[name]) for row in rows if name in row.scores]
            if points:
                x, scores = zip(*points, strict=True)
                means, sds = [score.mean for score in scores], [score.sd or 0.0 for score in scores]
                label = "\n".join(textwrap.wrap(group, _NAME))
                bars = {"yerr": sds, "capsize": 3} if any(sds) else {}
                axes.errorbar(x, means, color=colour, marker=marker, markersize=5, linewidth=1.4, label=label, **bars)
            if name == "accuracy":
                popular = [row.scores["popular"].mean for row in rows]
                axes.plot([row.number for row in rows], popular, color=colour, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_xscale("log", base=2)
        numbers = sorted({row.number for row in found.rows})
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.minorticks_off()
        if name == "ms":
            axes.set_ylim(bottom=0)
        title = f"{title} (dashed: most met codes)" if name == "accuracy" else title
        dress(axes, title, "interests K", "")
    _calibration(panels[5], found.reliability)
    figure.suptitle(f"Soft search over the number of interests ({grid.stage} users)", fontsize=13)
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=min(len(names), 2), fontsize=9, frameon=False)
    return png(figure)


def _calibration(axes: "Axes", bins: "dict[str, Reliability]") -> None:
    """Reliability of the interest tower at the runs' own K."""
    reach = 0.0
    for found, (colour, marker) in zip(bins.values(), _styles(len(bins)), strict=True):
        axes.plot(found.claimed, found.observed, color=colour, marker=marker, markersize=5, linestyle="none")
        reach = max(reach, float(found.claimed.max()), float(found.observed.max()))
    axes.plot([0, reach], [0, reach], color="#999999", linestyle=(0, (3, 2)), linewidth=1)
    dress(axes, "calibration of the own K codes together", "claimed probability", "share of the answers")


def _styles(number: int) -> Sequence[tuple[str, str]]:
    return [STYLES[at % len(STYLES)] for at in range(number)]
