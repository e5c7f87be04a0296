"""The tables of `recsys study codes`, for the report and as CSV."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from recsys_lightning.analysis.codes_cards import CodeCard, Prefix
from recsys_lightning.analysis.codes_measures import Agreement, Change, Mutual, Shares
from recsys_lightning.analysis.codes_view import Between, CodeView

Table = tuple[list[str], list[list[str]]]
"""Titles of the columns, and rows."""


def use_table(views: Sequence[CodeView]) -> Table:
    """How many codes a run has and uses, and how many items they have, a row a run and level of codes."""
    sizes = ["items of the largest", "of the median", "of the smallest in use", "codes of one item"]
    head = ["run", "codes of level", "possible", "in use", "perplexity", *sizes]
    body = []
    for view in views:
        for of in view.levels.values():
            spread = [of.sizes.max(), np.median(of.sizes), of.sizes.min(), (of.sizes == 1).sum()]
            counts = [f"{of.possible:,}", f"{len(of.sizes):,}", f"{of.perplexity:,.1f}"]
            body.append([view.name, of.name, *counts, *(f"{number:,.0f}" for number in spread)])
    return head, body


def agreement_table(views: Sequence[CodeView]) -> Table:
    """Measures against the categories, in brackets what chance reaches; no row where there is nothing to agree with."""
    head = ["run", "codes of level", "categories of level", "items", "categories", "largest"]
    head += ["purity (chance)", "homogeneity (chance)", "completeness (chance)", "NMI (chance)", "AMI"]
    body = []
    for view in views:
        for of in view.levels.values():
            for level, found in of.agreements.items():
                if found is None:
                    continue
                row = [view.name, of.name, str(level)]
                counts = [f"{found.items:,}", f"{found.categories:,}", f"{found.largest:.3f}"]
                both = zip(_ordered(found.found), _ordered(found.chance), strict=True)
                shares = [f"{value:.3f} ({chance:.3f})" for value, chance in both]
                body.append([*row, *counts, *shares, _share(found.adjusted.nmi)])
    return head, body


def _ordered(of: Shares) -> tuple[float, ...]:
    return of.purity, of.homogeneity, of.completeness, of.nmi


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def next_table(views: Sequence[CodeView]) -> Table:
    """How far the codes of an item foretell those of the next one."""
    head = ["run", "codes of level", "same code next", "by chance", "times chance"]
    head += ["NMI with the next code (chance)", "AMI"]
    body = []
    for view in views:
        for of in view.levels.values():
            if of.next is None or of.foretold is None:
                continue
            share, chance = of.next
            times = f"{share / chance:,.1f}"
            mutual = f"{of.foretold.nmi:.3f} ({of.foretold.chance:.3f})"
            row = [view.name, of.name, f"{share:.2%}", f"{chance:.2%}", times, mutual, _share(of.foretold.ami)]
            body.append(row)
    return head, body


def between_table(found: Sequence[Between]) -> Table:
    """Each run against each later one, a row a level of codes."""
    head = ["run", "codes of level", "other run", "codes of level", "NMI (chance)", "AMI"]
    return head, [
        [of.first.name, of.levels[0].name, of.second.name, of.levels[1].name, _mutual(of.mutual), _share(of.mutual.ami)]
        for of in found
    ]


def _mutual(of: Mutual) -> str:
    return f"{of.nmi:.3f} ({of.chance:.3f})"


def change_table(views: Sequence[CodeView], changes: Sequence[Change]) -> Table:
    """What became of the level-1 codes of the first run in each later one."""
    head = ["to", "items with another number", "items outside the counterpart"]
    return head, [
        [view.name, f"{found.renumbered:.1%}", f"{found.moved:.1%}"]
        for view, found in zip(views[1:], changes, strict=True)
    ]


def card_table(cards: Sequence[CodeCard]) -> Table:
    """Codes of one level of a run."""
    head = ["code", "items", "training", "purity", "categories", "words", "most met items", "nearest codes"]
    return head, [
        [
            code_name(card.prefix),
            f"{card.items:,}",
            f"{card.interactions:.1%}",
            *_meaning(card),
            "; ".join(card.top_items),
            ", ".join(f"{code_name(prefix)} ({alike:.2f})" for prefix, alike in card.nearest) or "-",
        ]
        for card in cards
    ]


def code_name(prefix: Prefix) -> str:
    """A prefix as it is written: its codes with dashes between."""
    return "-".join(map(str, prefix))


def pair_table(before: Sequence[CodeCard], after: Sequence[CodeCard], found: Change, shown: int) -> Table:
    """The level-1 codes of one run beside their counterparts in another, the largest first; last those without one."""
    side = ["code", "items", "purity", "categories", "words"]
    head = [*side, "items in both", *(f"{name} there" for name in side)]
    first, second = ({card.prefix[0]: card for card in cards} for cards in (before, after))
    rows: list[tuple[CodeCard | None, int, CodeCard | None]] = [
        (first.pop(one), number, second.pop(other)) for one, other, number in found.pairs
    ]
    # What has no counterpart comes last, so that no code in use is missing.
    rows += [(card, 0, None) for card in first.values()] + [(None, 0, card) for card in second.values()]
    return head, [[*_side(one), f"{number:,}", *_side(other)] for one, number, other in rows[:shown]]


def _side(card: CodeCard | None) -> list[str]:
    return ["-"] * 5 if card is None else [code_name(card.prefix), f"{card.items:,}", *_meaning(card)]


def _meaning(card: CodeCard) -> list[str]:
    purity = "-" if card.purity is None else f"{card.purity:.2f}"
    categories = ", ".join(f"{name} {share:.0%}" for name, share in card.categories) or "-"
    return [purity, categories, " ".join(card.words) or "-"]


# ---------------------------------------------------------------------------------------------------------------- CSV


def cards_csv(views: Sequence[CodeView]) -> bytes:
    """All cards of all runs."""
    return _csv(
        [
            {
                "run": view.name,
                "level": card.level,
                "code": code_name(card.prefix),
                "items": card.items,
                "training": card.interactions,
                "purity": card.purity,
                "categories": "; ".join(f"{name} {share:.4f}" for name, share in card.categories),
                "words": " ".join(card.words),
                "most_met_items": "; ".join(card.top_items),
                "nearest": "; ".join(f"{code_name(prefix)} {alike:.4f}" for prefix, alike in card.nearest),
            }
            for view in views
            for of in view.levels.values()
            for card in of.cards
        ]
    )


def measures_csv(views: Sequence[CodeView], field: str | None) -> bytes:
    """Use, next items and agreement at full precision, a row a run, level of codes and level of categories."""
    rows: list[dict[str, object]] = []
    for view in views:
        for of in view.levels.values():
            use: dict[str, object] = {
                "run": view.name,
                "code_level": of.level,
                "possible": of.possible,
                "used": len(of.sizes),
                "perplexity": of.perplexity,
                "pairs": view.pairs,
                "next_share": of.next and of.next.share,
                "next_chance": of.next and of.next.chance,
                "next_nmi": of.foretold and of.foretold.nmi,
                "next_nmi_chance": of.foretold and of.foretold.chance,
                "next_ami": of.foretold and of.foretold.ami,
            }
            agreements: list[tuple[int | None, Agreement | None]] = [*of.agreements.items()] or [(None, None)]
            rows += [{**use, "field": field, "level": level, **_measured(found)} for level, found in agreements]
    return _csv(rows)


def _measured(found: Agreement | None) -> dict[str, object]:
    counts = ("items", "cells", "categories", "largest")
    values: dict[str, object] = {name: found and getattr(found, name) for name in counts}
    for prefix, of in (("", "found"), ("chance_", "chance"), ("adjusted_", "adjusted")):
        for name in Shares._fields:
            values[prefix + name] = found and getattr(getattr(found, of), name)
    return values


def between_csv(found: Sequence[Between]) -> bytes:
    """Each run against each later one, a row a level of codes."""
    return _csv(
        [
            {
                "run": of.first.name,
                "level": of.levels[0].level,
                "other": of.second.name,
                "other_level": of.levels[1].level,
                **of.mutual._asdict(),
            }
            for of in found
        ]
    )


def changes_csv(views: Sequence[CodeView], changes: Sequence[Change]) -> bytes:
    """All pairs of level-1 codes and counterparts."""
    return _csv(
        [
            {"before": views[0].name, "after": view.name, "code": one, "counterpart": other, "items_in_both": number}
            for view, found in zip(views[1:], changes, strict=True)
            for one, other, number in found.pairs
        ]
    )


def _csv(rows: Sequence[dict[str, object]]) -> bytes:
    return pl.DataFrame(rows, infer_schema_length=None).write_csv().encode()
