"""The tables of `recsys study codes`, for the report and as CSV."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from recsys_lightning.analysis.study_sparc_cards import CodeCard
from recsys_lightning.analysis.study_sparc_codes import Agreement, Change, Ints

Table = tuple[list[str], list[list[str]]]
"""Titles of the columns, and rows."""


class CodeView(NamedTuple):
    """The level-1 codes of a run and what they stand for.

    Attributes:
        name: of the run.
        codes: (I,) of items 1 .. I.
        num_codes: C.
        perplexity: evenly used codes of the same entropy.
        cards: of the codes that an item has, the largest first.
        agreements: with the categories, by level; None where there are fewer than two.
    """

    name: str
    codes: Ints
    num_codes: int
    perplexity: float
    cards: list[CodeCard]
    agreements: dict[int, Agreement | None]


def use_table(views: Sequence[CodeView]) -> Table:
    """How many codes a run has and uses, and how many items they have."""
    head = ["run", "codes", "in use", "perplexity", "items of the largest", "of the median", "of the smallest in use"]
    body = []
    for view in views:
        sizes = np.array([card.items for card in view.cards])
        counts = [view.num_codes, len(sizes)]
        spread = [sizes.max(), np.median(sizes), sizes.min()]
        body.append([view.name, *map(str, counts), f"{view.perplexity:.1f}", *(f"{size:,.0f}" for size in spread)])
    return head, body


def agreement_table(views: Sequence[CodeView]) -> Table:
    """Measures against the categories, a row a run and level; `-` where there is nothing to agree with."""
    head = ["run", "level", "items", "categories", "largest", "purity", "NMI", "AMI", "homogeneity"]
    body = []
    for view in views:
        for level, found in view.agreements.items():
            if found is None:
                body.append([view.name, str(level), *["-"] * 7])
            else:
                shares = [f"{value:.4f}" for value in found[2:]]
                body.append([view.name, str(level), f"{found.items:,}", str(found.categories), *shares])
    return head, body


def change_table(views: Sequence[CodeView], changes: Sequence[Change]) -> Table:
    """Each later run against the first."""
    head = ["to", "NMI", "AMI", "items with another number", "items outside the counterpart"]
    body = []
    for view, found in zip(views[1:], changes, strict=True):
        shares = [f"{value:.1%}" for value in (found.renumbered, found.moved)]
        body.append([view.name, f"{found.nmi:.4f}", f"{found.ami:.4f}", *shares])
    return head, body


def card_table(view: CodeView, shown: int) -> Table:
    """The largest codes of a run."""
    head = ["code", "items", "training", "purity", "categories", "words", "most met items"]
    return head, [
        [str(card.code), f"{card.items:,}", f"{card.interactions:.1%}", *_meaning(card), "; ".join(card.top_items)]
        for card in view.cards[:shown]
    ]


def pair_table(before: CodeView, after: CodeView, found: Change, shown: int) -> Table:
    """The codes of one run beside their counterparts in another, the largest first; last those without one."""
    side = ["code", "items", "purity", "categories", "words"]
    head = [*side, "items in both", *(f"{name} there" for name in side)]
    first, second = ({card.code: card for card in view.cards} for view in (before, after))
    rows: list[tuple[CodeCard | None, int, CodeCard | None]] = [
        (first.pop(one), number, second.pop(other)) for one, other, number in found.pairs
    ]
    # What has no counterpart comes last, so that no code in use is missing.
    rows += [(card, 0, None) for card in first.values()] + [(None, 0, card) for card in second.values()]
    return head, [[*_side(one), f"{number:,}", *_side(other)] for one, number, other in rows[:shown]]


def _side(card: CodeCard | None) -> list[str]:
    return ["-"] * 5 if card is None else [str(card.code), f"{card.items:,}", *_meaning(card)]


def _meaning(card: CodeCard) -> list[str]:
    purity = "-" if card.purity is None else f"{card.purity:.2f}"
    categories = ", ".join(f"{name} {share:.0%}" for name, share in card.categories) or "-"
    return [purity, categories, " ".join(card.words) or "-"]


def cards_csv(views: Sequence[CodeView]) -> bytes:
    """All codes of all runs."""
    rows = [
        {
            "run": view.name,
            "code": card.code,
            "items": card.items,
            "training": card.interactions,
            "purity": card.purity,
            "categories": "; ".join(f"{name} {share:.4f}" for name, share in card.categories),
            "words": " ".join(card.words),
            "most_met_items": "; ".join(card.top_items),
        }
        for view in views
        for card in view.cards
    ]
    return pl.DataFrame(rows, infer_schema_length=None).write_csv().encode()


def measures_csv(views: Sequence[CodeView], field: str | None) -> bytes:
    """Use and agreement at full precision, a row a run and level."""
    rows: list[dict[str, object]] = []
    for view in views:
        use = {"run": view.name, "codes": view.num_codes, "used": len(view.cards), "perplexity": view.perplexity}
        agreements: list[tuple[int | None, Agreement | None]] = [*view.agreements.items()] or [(None, None)]
        for level, found in agreements:
            measured = found._asdict() if found else dict.fromkeys(Agreement._fields)
            rows.append({**use, "field": field, "level": level, **measured})
    return pl.DataFrame(rows, infer_schema_length=None).write_csv().encode()


def changes_csv(views: Sequence[CodeView], changes: Sequence[Change]) -> bytes:
    """All pairs of codes and counterparts."""
    rows = [
        {"before": views[0].name, "after": view.name, "code": one, "counterpart": other, "items_in_both": number}
        for view, found in zip(views[1:], changes, strict=True)
        for one, other, number in found.pairs
    ]
    return pl.DataFrame(rows).write_csv().encode()
