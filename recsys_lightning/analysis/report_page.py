"""The page of a report: sections written into one HTML file that asks nothing of any network."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from recsys_lightning.analysis.report_blocks import Section
from recsys_lightning.analysis.report_figures import PALETTE, require_plotly

if TYPE_CHECKING:
    from markupsafe import Markup

_ON_DARK = ("#58ABE0", "#F58B4C", "#2FC79A", "#E3A2C8", "#DDDDDD", "#F2B93B", "#9AD2F5")  # the palette on a dark ground


def breakable(text: str) -> "Markup":
    """A name, escaped, that may be broken behind its slashes, dashes, dots and underscores."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([/_.-])", r"\1<wbr>", str(escape(text))))  # noqa: S704 - it has just been escaped


@dataclass(frozen=True)
class Heading:
    """What stands above the sections.

    Attributes:
        title: of the page.
        lines: below it.
        refresh: seconds after which a browser shall read the file again; None for a finished report.
    """

    title: str
    lines: Sequence[str]
    refresh: int | None = None


def page(heading: Heading, sections: Sequence[Section]) -> str:
    """The HTML file. Whatever comes from data is escaped.

    Raises:
        InputError: plotly or jinja2 is not installed.
    """
    require_plotly()
    import jinja2
    from plotly.offline import get_plotlyjs

    assets = files(__package__) / "report_assets"
    parts = {name: (assets / name).read_text(encoding="utf-8") for name in ("page.html.j2", "style.css", "page.js")}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = breakable
    has_plots = any(block.kind == "plot" for section in sections for block in section.blocks)
    return environment.from_string(parts["page.html.j2"]).render(
        heading=heading,
        sections=sections,
        style=parts["style.css"],
        script=parts["page.js"],
        plotly=get_plotlyjs() if has_plots else "",
        colours=dict(zip(PALETTE, _ON_DARK, strict=True)),
    )
