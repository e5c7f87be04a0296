"""What a report is made of: sections of paragraphs, tables, plots, code cards and example users."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from recsys_lightning.analysis.codes_cards import CodeCard


@dataclass(frozen=True)
class Paragraph:
    """A line of prose; a `warning` stands out."""

    text: str
    tone: Literal["note", "warning"] = "note"
    kind: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class DataTable:
    """A table.

    Attributes:
        title: above it.
        head: titles of the columns.
        body: cells.
        bold: places (row, column) in the body of what stands out.
        words: columns, from the left, that hold words and not numbers.
        folded: only the title is shown until it is asked for more.
    """

    title: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]] = frozenset()
    words: int = 1
    folded: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Plot:
    """An interactive plot.

    Attributes:
        title: above it.
        figure: without a title of its own.
        note: below the title: how to read it.
        height: in pixels.
        wide: over the whole width of the page, and not beside another.
    """

    title: str
    figure: "go.Figure"
    note: str = ""
    height: int = 300
    wide: bool = False
    kind: ClassVar[str] = "plot"

    def json(self) -> str:
        """The figure as JSON that no HTML parser can be led astray by."""
        text: str = self.figure.to_json()
        return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@dataclass(frozen=True)
class CardShelf:
    """The code cards of a run.

    Attributes:
        anchor: of the run, the first half of the cards' anchors.
        title: whose codes.
        cards: of level 1, then of level 2.
        left_out: cards that are not shown, by level.
    """

    anchor: str
    title: str
    cards: Sequence["CodeCard"]
    left_out: dict[int, int]
    kind: ClassVar[str] = "cards"

    @property
    def levels(self) -> list[int]:
        """Levels that have cards."""
        return sorted({len(card.prefix) for card in self.cards})


@dataclass(frozen=True)
class ListedItem:
    """An item on a user's list.

    Attributes:
        rank: from 1.
        title: or raw id.
        semantic_id: such as ``3.14.1``; empty where the model has none.
        origin: what produced it, in words; empty where the model does not say.
        hit: it is an answer.
        seen: the user had met it before.
        card: anchor of its level-1 code's card; empty without one.
    """

    rank: int
    title: str
    semantic_id: str = ""
    origin: str = ""
    hit: bool = False
    seen: bool = False
    card: str = ""


@dataclass(frozen=True)
class UserList:
    """What a run recommends to a user; `verdict` says where the answers are."""

    run: str
    verdict: str
    found: bool
    items: Sequence[ListedItem]
    interests: str = ""


@dataclass(frozen=True)
class ExampleUser:
    """A user with a history, the answers, and the lists of the runs."""

    name: str
    history: Sequence[str]  # titles, newest first
    earlier: int  # items before these
    answers: Sequence[str]
    lists: Sequence[UserList]
    kind: ClassVar[str] = "user"


@dataclass(frozen=True)
class Settings:
    """Text behind a title, folded away."""

    title: str
    text: str
    kind: ClassVar[str] = "settings"


Block = Paragraph | DataTable | Plot | CardShelf | ExampleUser | Settings


@dataclass(frozen=True)
class Section:
    """A section of the report; one without blocks is not there, and `missing` says why.

    Attributes:
        key: anchor.
        title: heading.
        blocks: in order.
        missing: one line, shown where there are no blocks.
    """

    key: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    missing: str = ""
