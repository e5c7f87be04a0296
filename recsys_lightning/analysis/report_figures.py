"""Plots of the report. They need plotly, the extra ``report``."""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from recsys_lightning.errors import InputError

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito's colours, which the colour-blind can tell apart; the page's script swaps them on a dark ground.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#333333", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "cross", "x", "star")
SCALE = "Cividis"  # also for the colour-blind
_MARKED = 60  # a line of more points has no markers


def require_plotly() -> None:
    """Nothing, if a report can be made.

    Raises:
        InputError: plotly or jinja2 is not installed.
    """
    missing = [name for name in ("plotly", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'the report needs {" and ".join(missing)}: pip install "recsys_lightning[report]"')


class Line(NamedTuple):
    """A line of a plot.

    Attributes:
        name: in the legend.
        x: places.
        y: values.
        style: number of its colour and marker.
        dash: number of its dashes.
        text: a remark a point.
        listed: it stands in the legend.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    dash: int = 0
    text: Sequence[str] | None = None
    listed: bool = True


def colour(style: int) -> str:
    """The colour of a style number."""
    return PALETTE[style % len(PALETTE)]


def new_figure(x: str, y: str, log_y: bool = False) -> "go.Figure":
    """An empty figure; colours of text, grid and ground are the page's."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        template=go.layout.Template(),
        margin={"l": 58, "r": 12, "t": 10, "b": 44},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        hoverlabel={"namelength": -1},
    )
    figure.update_xaxes(title={"text": x, "standoff": 8}, automargin=True, zeroline=False)
    figure.update_yaxes(title={"text": y, "standoff": 8}, automargin=True, zeroline=False, rangemode="nonnegative")
    figure.update_yaxes(exponentformat="none", separatethousands=True)
    if log_y:
        figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    return figure


def line_figure(lines: Sequence[Line], x: str, y: str, log_y: bool = False) -> "go.Figure":
    """Lines over one another."""
    import plotly.graph_objects as go

    figure = new_figure(x, y, log_y)
    listed = sum(line.listed for line in lines) > 1
    for line in lines:
        marked = len(line.x) <= _MARKED
        figure.add_trace(
            go.Scatter(
                x=list(line.x),
                y=list(line.y),
                name=plain(line.name),
                showlegend=line.listed and listed,
                mode="lines+markers" if marked else "lines",
                line={"color": colour(line.style), "dash": DASHES[line.dash % len(DASHES)], "width": 1.8},
                marker={"symbol": SYMBOLS[line.style % len(SYMBOLS)], "size": 5, "color": colour(line.style)},
                text=None if line.text is None else list(line.text),
                hovertemplate="%{y:.4g}"
                + ("" if line.text is None else "<br>%{text}")
                + f"<extra>{plain(line.name)}</extra>",
            )
        )
    figure.update_layout(hovermode="x unified" if len(lines) < 9 else "closest")
    return figure


def share_figure(lines: Sequence[Line], x: str, y: str) -> "go.Figure":
    """Shares stacked up to one."""
    import plotly.graph_objects as go

    figure = new_figure(x, y)
    for line in lines:
        figure.add_trace(
            go.Scatter(
                x=list(line.x),
                y=list(line.y),
                name=plain(line.name),
                mode="lines",
                stackgroup="all",
                line={"color": colour(line.style), "width": 0.8},
                hovertemplate="%{y:.1%}" + f"<extra>{plain(line.name)}</extra>",
            )
        )
    figure.update_yaxes(range=[0, 1], tickformat=".0%")
    figure.update_layout(hovermode="x unified")
    return figure


def bar_figure(
    bars: Sequence[Line], x: str, y: str, log_y: bool = False, names: Sequence[str] | None = None
) -> "go.Figure":
    """Bars side by side; `names` stand on the x axis in the place of numbers."""
    import plotly.graph_objects as go

    figure = new_figure(x, y, log_y)
    for bar in bars:
        places: Sequence[Any] = [names[int(at)] for at in bar.x] if names is not None else list(bar.x)
        figure.add_trace(
            go.Bar(
                x=places,
                y=list(bar.y),
                name=plain(bar.name),
                showlegend=len(bars) > 1,
                marker={"color": colour(bar.style), "pattern": {"shape": ("", "/", ".", "x")[bar.style % 4]}},
                text=None if bar.text is None else list(bar.text),
                textposition="none",
                hovertemplate="%{x}: %{y:.4g}"
                + ("" if bar.text is None else "<br>%{text}")
                + f"<extra>{plain(bar.name)}</extra>",
            )
        )
    figure.update_layout(barmode="group", bargap=0.15)
    if names is not None:
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=list(names))
    return figure


def heat_figure(
    x: Sequence[float], values: Sequence[Sequence[float]], x_title: str, y_title: str, unit: str
) -> "go.Figure":
    """A row a code (from 0, at the bottom), a column a place in `x`."""
    import plotly.graph_objects as go

    figure = new_figure(x_title, y_title)
    bar = {"thickness": 10, "outlinewidth": 0, "title": {"text": unit, "side": "right"}, "nticks": 5}
    figure.add_trace(
        go.Heatmap(
            x=[f"{at:g}" for at in x],
            z=values,
            colorscale=SCALE,
            zmin=0,
            colorbar=bar,
            hovertemplate=f"{x_title} %{{x}}, {y_title} %{{y}}<br>%{{z}} {unit}<extra></extra>",
        )
    )
    figure.update_xaxes(type="category", showgrid=False, nticks=12)
    figure.update_yaxes(showgrid=False)
    return figure


def mark_events(
    figure: "go.Figure", places: Sequence[float], texts: Sequence[str], axis: Literal["x", "category"] = "x"
) -> None:
    """A dotted line with a marker on top for each event; its text is shown where the pointer is on the marker."""
    import plotly.graph_objects as go

    if not places:
        return
    at: list[Any] = [f"{place:g}" for place in places] if axis == "category" else list(places)
    for place in dict.fromkeys(at):
        figure.add_vline(x=place, line={"color": colour(1), "width": 1, "dash": "dot"})
    figure.add_trace(
        go.Scatter(
            x=at,
            y=[1] * len(at),
            yaxis="y2",
            name="event",
            showlegend=True,
            mode="markers",
            marker={"symbol": "triangle-down", "size": 10, "color": colour(1)},
            text=[plain(text) for text in texts],
            hovertemplate="%{text}<extra>event</extra>",
        )
    )
    figure.update_layout(yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True})


def plain(text: str) -> str:
    """Text as plotly shows it letter by letter: it knows a few HTML tags and its own placeholders."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "% {")
