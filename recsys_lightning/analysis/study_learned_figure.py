"""The picture of learned BeamFusion: calibration, and tau and psi of the users. It needs matplotlib."""

from typing import TYPE_CHECKING

import numpy as np

from recsys_lightning.analysis.figures import STYLES, dress, new_figure, png
from recsys_lightning.analysis.study_learned_compare import LEARNED, Comparison, bins_of
from recsys_lightning.analysis.user_values import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 4000  # users of a scatter plot


def learned_png(found: Comparison) -> bytes:
    """Reliability on both splits above; tau and psi of the test users by the entropy of their beams below.

    Returns:
        The PNG file, 1200 pixels wide.

    Raises:
        InputError: see `require_matplotlib`.
    """
    figure = new_figure(9.6)
    panels = figure.subplots(2, 2)
    names = list(next(iter(found.ranked.values())))
    for axes, (stage, ways) in zip(panels[0], found.ranked.items(), strict=True):
        # Two ways may have chosen the same pair: then a smaller mark lies on a larger one.
        for (name, ranked), (colour, marker), size in zip(ways.items(), STYLES, (10, 7, 4, 6), strict=False):
            bins = bins_of(ranked, ranked.claimed)
            label = f"{name} (ECE {bins.error():.4f})"
            width = 2.2 if name == LEARNED else size / 4
            axes.plot(
                bins.claimed, bins.observed, color=colour, marker=marker, markersize=size, linewidth=width, label=label
            )
        reach = max(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot([0, reach], [0, reach], color="#999999", linestyle=(0, (3, 2)), linewidth=1, label="calibrated")
        dress(axes, f"Is the first item the answer? ({stage})", "claimed chance", "share of users")
        axes.legend(fontsize=9, frameon=False, loc="best")
    ways = found.ranked["test"]
    for axes, part in zip(panels[1], ("tau", "psi"), strict=True):
        _scatter(axes, found.entropy, getattr(ways[LEARNED], part))
        for at, (name, (colour, _)) in enumerate(zip(names, STYLES, strict=False)):
            if name != LEARNED:
                value = float(getattr(ways[name], part)[0])
                axes.axhline(value, color=colour, linestyle=(4 * at, (4, 8)), linewidth=1.8, label=f"{name}: {value:g}")
        axes.margins(y=0.1)
        dress(axes, f"{part} of the test users", "entropy of the beams, nats", part)
        axes.legend(fontsize=9, frameon=False, loc="best")
    figure.suptitle(f"Learned BeamFusion, mode {found.mode}", fontsize=13)
    return png(figure)


def _scatter(axes: "Axes", x: Floats, y: Floats) -> None:
    shown = np.random.default_rng(0).permutation(len(x))[:_POINTS]
    colour = STYLES[3][0]  # of the learned weights above, the fourth line
    axes.plot(x[shown], y[shown], linestyle="none", marker=".", markersize=3, color=colour, alpha=0.5, label="learned")
