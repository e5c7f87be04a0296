"""The report on runs, finished or under way: one HTML file with tables, plots, code cards and example users."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePath
from typing import TYPE_CHECKING

from recsys_lightning.analysis.groups import Group, group_runs
from recsys_lightning.analysis.report_blocks import Block, Paragraph, Section
from recsys_lightning.analysis.report_codebooks import cell_histogram, codebooks
from recsys_lightning.analysis.report_curves import learning_curves, loss_balance
from recsys_lightning.analysis.report_headline import chosen_cut_off, headline
from recsys_lightning.analysis.report_page import Heading, page
from recsys_lightning.analysis.report_settings import configuration
from recsys_lightning.analysis.report_sources import Source
from recsys_lightning.errors import InputError

if TYPE_CHECKING:  # torch comes with these: a report without the models does without it
    from recsys_lightning.analysis.report_opened import OpenedRun
    from recsys_lightning.analysis.study_run import Progress

MODEL_SECTIONS = {
    "cells": "Cell sizes",
    "popularity": "Recall by popularity",
    "diversity": "Recall and diversity",
    "cards": "What the codes mean",
    "users": "Example users",
}


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What a report holds.

    Attributes:
        title: of the page.
        k: cut-off of slices, lists and plots; the nearest that the runs have is taken.
        users: test users drawn for recall and diversity.
        examples: example users.
        places: of each of their lists.
        cards: code cards a level, of the largest codes.
        seed: of all that is drawn.

    Raises:
        InputError: a number below 1.
    """

    title: str = "Report"
    k: int = 10
    users: int = 500
    examples: int = 5
    places: int = 10
    cards: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("k", "users", "examples", "places", "cards"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Opened:
    """The runs that a report computes from, and why others are not among them."""

    runs: "Sequence[OpenedRun]"
    remarks: Sequence[str] = ()


def shown_names(sources: Sequence[Source]) -> list[str]:
    """A short name for each run: the last two folders of its path, and the whole of it where that is not unique."""
    short = [PurePath(source.name).parts for source in sources]
    names = ["/".join(parts[-2:]) for parts in short]
    return [name if names.count(name) == 1 else source.name for name, source in zip(names, sources, strict=True)]


def groups_of(sources: Sequence[Source]) -> list[Group]:
    """Runs that differ in their seed alone as one group each.

    Raises:
        InputError: two runs are the same also in their seeds.
    """
    return group_runs([source.run for source in sources])


def representatives(sources: Sequence[Source]) -> list[Source]:
    """The first run of each group: what a report computes anew, and plots run by run, is of these."""
    first = {group.runs[0].folder for group in groups_of(sources)}
    return [source for source in sources if source.run.folder in first]


def build_report(
    sources: Sequence[Source],
    settings: ReportSettings,
    opened: Opened | str,
    progress: "Progress",
    command: str = "recsys report",
    refresh: int | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> str:
    """The report as an HTML file.

    Args:
        sources: the runs.
        settings: what the report holds.
        opened: of `representatives`; or why no model is opened, in words.
        progress: told of whatever takes its time.
        command: that the report names as its author.
        refresh: seconds after which a browser shall read the file again; None for a finished report.
        now: the time.

    Raises:
        InputError: two runs are the same also in their seeds, or plotly is missing.
    """
    names = dict(zip(shown_names(sources), sources, strict=True))
    groups = groups_of(sources)
    k = chosen_cut_off(groups, settings.k)
    chosen = {name: source for name, source in names.items() if source in representatives(sources)}
    sections = [
        _with_warnings(headline(groups, k, settings.seed), sources),
        learning_curves(names, k),
        codebooks(chosen),
        loss_balance(chosen),
        *_model_sections(chosen, settings, opened, k, progress),
        configuration(names),
    ]
    lines = [
        ", ".join(dict.fromkeys(f"{source.run.results['model']}" for source in sources))
        + f", {len(sources)} run{'s' if len(sources) > 1 else ''}",
        f"Written {now():%Y-%m-%d %H:%M} UTC by {command}.",
    ]
    if len(chosen) < len(names):
        lines.append("Seeds of one setting are a row of the tables; sections run by run are of the first of each.")
    return page(Heading(settings.title, lines, refresh), sections)


def _with_warnings(section: Section, sources: Sequence[Source]) -> Section:
    """The headline below what a reader must know first: runs under way, collapsed codebooks, files not read."""
    lines: list[Block] = []
    for source in sources:
        if not source.finished:
            note = "is under way: its numbers are of its best validation so far."
            lines.append(Paragraph(f"{source.name} {note}"))
        if source.run.results.get("collapsed"):
            lines.append(Paragraph(f"{source.name}: its level-1 codebook has collapsed.", "warning"))
        lines += [Paragraph(f"{source.name}: {remark}", "warning") for remark in source.remarks]
    if section.blocks:
        return Section(section.key, section.title, [*lines, *section.blocks])
    return Section(section.key, section.title, [*lines, Paragraph(section.missing)] if lines else (), section.missing)


def _model_sections(
    sources: dict[str, Source], settings: ReportSettings, opened: Opened | str, k: int | None, progress: "Progress"
) -> list[Section]:
    """What needs the data, the codes or the models; each says so where they are not there."""
    from recsys_lightning.analysis.report_diversity import diversity

    if isinstance(opened, str):
        recorded = diversity((), sources, k, settings.users, settings.seed, progress)
        there = {"diversity": recorded} if recorded.blocks else {}
        return [there.get(key, Section(key, title, (), opened)) for key, title in MODEL_SECTIONS.items()]
    from recsys_lightning.analysis.report_cards import cards
    from recsys_lightning.analysis.report_popularity import popularity
    from recsys_lightning.analysis.report_users import example_users

    runs = opened.runs
    codes = {run.name: run.table.codes[1:].numpy() for run in runs if run.table is not None}
    without = [f"{run.name} has no semantic IDs." for run in runs if run.table is None]
    shelves, names = cards(runs, settings.cards, progress)
    made = [
        cell_histogram(codes, without),
        popularity(runs, k),
        diversity(runs, sources, k, settings.users, settings.seed, progress),
        shelves,
        example_users(runs, settings.examples, settings.places, settings.seed, names, progress),
    ]
    failed = [Paragraph(line, "warning") for line in opened.remarks]
    return [
        Section(part.key, part.title, [*failed, *part.blocks] if part.blocks or failed else (), part.missing)
        for part in made
    ]
