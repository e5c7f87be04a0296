"""The picture of tokenizers: recall over each cheap figure. It needs matplotlib, the extra ``plots``."""

from collections.abc import Sequence

from recsys_lightning.analysis.figures import STYLES, dress, new_figure, png
from recsys_lightning.analysis.study_tokenizers import FIGURES, Correlation, Tokenized

_COLUMNS = 3


def tokenizers_png(rows: Sequence[Tokenized], found: Sequence[Correlation], metric: str) -> bytes:
    """A panel a cheap figure, a mark a tokenizer, with the rank correlation above it.

    Returns:
        The PNG file, 1200 pixels wide.

    Raises:
        InputError: see `require_matplotlib`.
    """
    down = -(-len(FIGURES) // _COLUMNS)
    figure = new_figure(2.6 * down + 1.4)
    panels = figure.subplots(down, _COLUMNS, squeeze=False).flatten()
    for panel, cheap, correlation in zip(panels, FIGURES, found, strict=False):
        for at, row in enumerate(rows):
            value, colour = cheap.value(row), STYLES[at % len(STYLES)][0]
            if value is not None:
                marker = STYLES[(at // len(STYLES) + at) % len(STYLES)][1]  # colour and marker tell them apart together
                panel.plot(value, row.scores[metric].mean, marker, color=colour, markersize=7, label=row.name)
        known = "" if correlation.rho is None else f" (rho {correlation.rho:+.2f})"
        dress(panel, f"{cheap.heading}{known}", "", metric)
    for panel in panels[len(FIGURES) :]:
        panel.set_axis_off()
    handles, names = next(panel.get_legend_handles_labels() for panel in panels[1:])  # a panel that has all
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.suptitle(f"What the codes look like, and {metric}", fontsize=13)
    return png(figure)
