"""All that `recsys study codes` measures of one run's codes.

Axis letters: I items, C prefixes in use.
"""

from typing import NamedTuple

import torch

from recsys_lightning.analysis.codes_agreement import NextCode, next_code_agreement, next_pairs
from recsys_lightning.analysis.codes_cards import CodeCard, code_cards
from recsys_lightning.analysis.codes_facts import Facts
from recsys_lightning.analysis.codes_measures import (
    Agreement,
    Ints,
    Mutual,
    agreement,
    mutual_information,
    prefix_numbers,
)
from recsys_lightning.analysis.codes_run import CodedRun
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.usage import code_usage


class CardsAsked(NamedTuple):
    """Which codes get a card.

    Attributes:
        levels: of the codes, from 1.
        min_items: of a code of level 2 and on; a code of few items says little that its items do not. Codes of level 1
            have cards whatever their size.
    """

    levels: tuple[int, ...] = (1, 2)
    min_items: int = 2


class LevelView(NamedTuple):
    """The codes of one level of a run: prefixes of that length.

    Attributes:
        level: l.
        name: of the level, for tables.
        possible: prefixes that there could be, K^l.
        number: (I,) of each item's prefix.
        sizes: (C,) items of each prefix in use, the largest first.
        perplexity: evenly used prefixes of the same entropy.
        agreements: with the categories, by their level; None where there are fewer than two.
        next: how often consecutive items have one prefix; None where no user has two.
        foretold: what the prefix of an item says of that of the next one; None where no user has two.
        cards: of the codes in use, the largest first; none where they were not asked for.
    """

    level: int
    name: str
    possible: int
    number: Ints
    sizes: Ints
    perplexity: float
    agreements: dict[int, Agreement | None]
    next: NextCode | None
    foretold: Mutual | None
    cards: list[CodeCard]


class CodeView(NamedTuple):
    """A run's codes and what they stand for.

    Attributes:
        name: of the run.
        table: of its codes.
        levels: 1, 2 and the whole ID, as far as these differ.
        pairs: of consecutive training interactions.
    """

    name: str
    table: SemanticIds
    levels: dict[int, LevelView]
    pairs: int

    @property
    def codes(self) -> Ints:
        """(I,) level-1 code of each item."""
        codes: Ints = self.table.codes[1:, 0].numpy()
        return codes


def studied_levels(table: SemanticIds) -> list[int]:
    """1, 2 and the whole ID, as far as these differ."""
    return sorted({1, min(2, table.num_levels), table.num_levels})


def view_codes(
    run: CodedRun, facts: Facts, labels: dict[int, list[str | None]], cards: CardsAsked, seed: int
) -> CodeView:
    """Measure the codes of a run.

    Args:
        run: whose codes.
        facts: of its items, for the cards.
        labels: category of each item, by level.
        cards: what gets a card; levels that the run lacks are left out.
        seed: of all that is drawn.
    """
    table = run.table
    steps = next_code_agreement(table.codes.numpy(), run.sequences) if _any_step(run) else None
    pairs = next_pairs(run.sequences) - 1 if steps else None  # (P, 2) rows of items
    levels = {}
    for level in sorted({*studied_levels(table), *(level for level in cards.levels if level <= table.num_levels)}):
        number, prefixes = prefix_numbers(table, level)
        usage = code_usage(torch.from_numpy(number)[:, None], len(prefixes))
        sizes = usage.counts[0].sort(descending=True).values.numpy()
        large = int((sizes >= cards.min_items).sum()) if level > 1 else None
        levels[level] = LevelView(
            level=level,
            name=f"{level} (whole ID)" if level == table.num_levels else str(level),
            possible=table.num_codes**level,
            number=number,
            sizes=sizes,
            perplexity=float(usage.perplexity),
            agreements={of: agreement(number, known, seed) for of, known in labels.items()},
            next=steps[level - 1] if steps else None,
            foretold=mutual_information(number[pairs[:, 0]], number[pairs[:, 1]], seed) if pairs is not None else None,
            cards=code_cards(table, run.catalog, level, large, facts) if level in cards.levels else [],
        )
    return CodeView(run.name, table, levels, 0 if pairs is None else len(pairs))


def _any_step(run: CodedRun) -> bool:
    return any(len(items) > 1 for items in run.sequences)


class Between(NamedTuple):
    """Two runs' codes of one level against each other.

    Attributes:
        first: the one run.
        second: the other.
        levels: of the codes of the one and of the other: the same, or the whole ID of both.
        mutual: how far they are one grouping.
    """

    first: CodeView
    second: CodeView
    levels: tuple[LevelView, LevelView]
    mutual: Mutual


def between(first: CodeView, second: CodeView, seed: int) -> list[Between]:
    """Compare two runs at level 1, level 2 and by the whole ID; `seed` is of what is drawn."""
    ends = first.table.num_levels, second.table.num_levels
    wanted = sorted({(1, 1), *([(2, 2)] if min(ends) > 1 else []), ends})
    found = []
    for one, other in wanted:
        pair = first.levels[one], second.levels[other]
        found.append(Between(first, second, pair, mutual_information(pair[0].number, pair[1].number, seed)))
    return found
