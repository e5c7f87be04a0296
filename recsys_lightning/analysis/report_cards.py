"""Code cards of the report: what the level-1 and level-2 codes of each run stand for."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from recsys_lightning.analysis.codes_cards import CodeCard, code_cards
from recsys_lightning.analysis.codes_facts import Facts, item_facts
from recsys_lightning.analysis.report_blocks import Block, CardShelf, Paragraph, Section
from recsys_lightning.analysis.report_opened import OpenedRun
from recsys_lightning.analysis.study_run import Progress
from recsys_lightning.errors import InputError

LEVELS = (1, 2)
_WORDS = 3  # that name a code elsewhere in the report


class CodeNames(NamedTuple):
    """What the level-1 codes of a run are called elsewhere in the report.

    Attributes:
        anchor: of the run's shelf.
        words: of each code that has a card, by code.
    """

    anchor: str
    words: Mapping[int, str]

    def card(self, code: int) -> str:
        """The anchor of a code's card; empty if it has none."""
        return f"{self.anchor}-{code}" if code in self.words else ""


NO_NAMES = CodeNames("", {})


def cards(runs: Sequence[OpenedRun], shown: int, progress: Progress) -> tuple[Section, dict[str, CodeNames]]:
    """A shelf of cards a run; runs with the same semantic IDs on the same items share one.

    Args:
        runs: opened.
        shown: cards of a level, of the largest codes.
        progress: told of each run.

    Returns:
        The section, and of each run that has cards what its codes are called.
    """
    shelves: list[CardShelf] = []
    kept: list[OpenedRun] = []  # whose cards are the shelves
    names: dict[str, CodeNames] = {}
    remarks: list[str] = []
    facts: dict[str, Facts] = {}
    coded = [run for run in runs if run.table is not None]
    for at, run in enumerate(coded):
        progress("code cards", at, len(coded))
        twin = next((number for number, other in enumerate(kept) if _same(run, other)), None)
        if twin is not None:
            remarks.append(f"{run.name} has the same semantic IDs as {kept[twin].name}.")
            names[run.name] = names[kept[twin].name]
            continue
        key = str(run.source.run.results["data"].get("fingerprint") or run.name)
        try:
            if key not in facts:
                facts[key] = item_facts(run.catalog)
            shelf = _shelf(run, f"codes-{len(shelves) + 1}", shown, facts[key])
        except InputError as error:
            remarks.append(f"{run.name}: {error}.")
            continue
        shelves.append(shelf)
        kept.append(run)
        words = {card.prefix[0]: ", ".join(card.words[:_WORDS]) for card in shelf.cards if card.level == 1}
        names[run.name] = CodeNames(shelf.anchor, words)
    if coded:
        progress("code cards", len(coded), len(coded))
    blocks: list[Block] = [*shelves, *map(Paragraph, remarks)] if shelves else []
    return Section("cards", "What the codes mean", blocks, " ".join(remarks) or "No run has semantic IDs."), names


def _same(one: OpenedRun, other: OpenedRun) -> bool:
    """Whether two runs give the same items the same codes."""
    if one.table is None or other.table is None or one.catalog.raw_ids != other.catalog.raw_ids:
        return False
    return bool(one.table.codes.shape == other.table.codes.shape and (one.table.codes == other.table.codes).all())


def _shelf(run: OpenedRun, anchor: str, shown: int, facts: Facts) -> CardShelf:
    table = run.table
    assert table is not None  # noqa: S101 - see cards
    found: list[CodeCard] = []
    left_out: dict[int, int] = {}
    for level in LEVELS[: table.num_levels]:
        written = code_cards(table, run.catalog, level, shown, facts)
        there = len({tuple(prefix) for prefix in table.codes[1:, :level].tolist()})
        found += written
        if there > len(written):
            left_out[level] = there - len(written)
    return CardShelf(anchor, run.name, found, left_out)
