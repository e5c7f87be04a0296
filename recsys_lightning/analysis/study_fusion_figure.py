"""The picture of the BeamFusion grid, after Figure 6 of COBRA. It needs matplotlib, the extra ``plots``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from recsys_lightning.analysis.figures import STYLES, dress, new_figure, png

if TYPE_CHECKING:
    from matplotlib.artist import Artist

    from recsys_lightning.analysis.study_fusion import FusionGrid, Measured, Setting

_TITLES = {"global": "softmax over all candidates (global)", "per_id": "softmax within an ID (per_id)"}


def fusion_png(found: Sequence["Measured"], grid: "FusionGrid", own: "Setting | None") -> bytes:
    """Recall and diversity over tau: a row of panels a mode, a line a number of beams, at one psi.

    The psi is the run's own where the grid has it, else the paper's 16, else the grid's first.

    Returns:
        The PNG file, 1200 pixels wide.

    Raises:
        InputError: see `require_matplotlib`.
    """
    psi = next(value for value in (own.psi if own else 16.0, 16.0, grid.psis[0]) if value in grid.psis)
    modes = list(dict.fromkeys(measured.setting.mode for measured in found if measured.in_grid))
    figure = new_figure(3.4 * len(modes) + 1.2)
    panels = figure.subplots(len(modes), 2, squeeze=False, sharex=True)
    for row, mode in enumerate(modes):
        for column, name in enumerate((f"recall@{grid.k}", f"diversity@{grid.k}")):
            axes = panels[row][column]
            for at, beams in enumerate(grid.beams):
                colour, marker = STYLES[at % len(STYLES)]
                points = sorted(
                    (measured.setting.tau, measured.values[name])
                    for measured in found
                    if measured.in_grid
                    and (measured.setting.mode, measured.setting.beams, measured.setting.psi) == (mode, beams, psi)
                )
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=f"M = {beams}")
            if own is not None and (own.mode, own.psi) == (mode, psi):
                axes.axvline(own.tau, color="#999999", linestyle=(0, (3, 2)), linewidth=1, label="the run's own tau")
            dress(axes, f"{name}, {_TITLES[mode]}", "tau" if row == len(modes) - 1 else "", name)
    figure.suptitle(f"BeamFusion over tau at psi = {psi:g} ({grid.stage} users)", fontsize=13)
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        handles |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = min(len(handles), 6)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=9, frameon=False
    )
    return png(figure)
