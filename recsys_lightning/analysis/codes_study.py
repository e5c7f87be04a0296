"""What `recsys study codes` reports: what codes mean, and how the codes of several runs differ."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from recsys_lightning.analysis.codes_facts import (
    LEVELS,
    TEXT_FIELDS,
    Facts,
    find_words,
    item_titles,
    item_vectors,
    item_words,
)
from recsys_lightning.analysis.codes_measures import CATEGORIES, DRAWS, Change, category_labels, change, telling_level
from recsys_lightning.analysis.codes_run import CodedRun
from recsys_lightning.analysis.codes_tables import (
    agreement_table,
    between_csv,
    between_table,
    card_table,
    cards_csv,
    change_table,
    changes_csv,
    measures_csv,
    next_table,
    pair_table,
    use_table,
)
from recsys_lightning.analysis.codes_view import Between, CardsAsked, CodeView, between, view_codes
from recsys_lightning.analysis.study_report import Findings, StudyTable
from recsys_lightning.analysis.study_run import Progress
from recsys_lightning.errors import InputError

Labels = dict[int, list[str | None]]
"""Category of each item by level."""


@dataclass(frozen=True, kw_only=True)
class CodeStudy:
    """What the study is asked for.

    Attributes:
        field: of the catalogue, that holds the categories; None takes ``categories`` if there is such a field.
        levels: of the categories, from 1; cards show the first of them with two different categories.
        code_levels: of the codes that get cards, from 1; those that a run lacks are left out.
        min_items: of a code of level 2 and on that gets a card.
        text_fields: whose words are counted, those that the catalogue lacks are skipped; None takes title, brand and
            description, and no words where there are none of them.
        shown: codes of a level in the tables, the largest; the CSV file has all.
        seed: of the deals that chance is measured by.

    Raises:
        InputError: levels are missing, named twice, or below 1.
    """

    field: str | None = None
    levels: tuple[int, ...] = LEVELS
    code_levels: tuple[int, ...] = CardsAsked().levels
    min_items: int = CardsAsked().min_items
    text_fields: tuple[str, ...] | None = None
    shown: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, levels in (("levels", self.levels), ("code_levels", self.code_levels)):
            if not levels or len(set(levels)) < len(levels) or min(levels) < 1:
                raise InputError(f"--{name} {' '.join(map(str, levels))}: need different levels from 1, at least one")


def code_study(runs: Sequence[CodedRun], asked: CodeStudy, progress: Progress) -> Findings:
    """Describe the codes of runs, and set the runs against each other.

    Args:
        runs: on the same items.
        asked: what to show.
        progress: told of each step.

    Raises:
        InputError: runs are on different items, none has codes of a level, or the catalogue has no such fields.
    """
    from recsys_lightning.analysis.codes_figure import codes_png

    deepest = max(run.table.num_levels for run in runs)
    if min(asked.code_levels) > deepest:
        raise InputError(f"--code_levels {min(asked.code_levels)}: the runs have codes of levels 1 to {deepest}")
    catalog = runs[0].catalog
    field = CATEGORIES if asked.field is None and CATEGORIES in catalog.fields.columns else asked.field
    labels: Labels = {level: category_labels(catalog.fields, field, level) for level in asked.levels} if field else {}
    telling = telling_level(labels)
    texts = asked.text_fields or TEXT_FIELDS
    words = item_words(catalog.fields, texts) if asked.text_fields else find_words(catalog.fields, texts)
    views = []
    for at, run in enumerate(runs):
        progress("codes", at, len(runs))
        if run.catalog.raw_ids != catalog.raw_ids:
            raise InputError(f"{run.name} and {runs[0].name} are on different items: study them apart")
        facts = Facts(item_titles(catalog), words, labels[telling] if telling else None, item_vectors(run.catalog))
        views.append(view_codes(run, facts, labels, CardsAsked(asked.code_levels, asked.min_items), asked.seed))
    pairs = [of for one, other in combinations(views, 2) for of in between(one, other, asked.seed)]
    changes = [change(views[0].codes, view.codes) for view in views[1:]]
    progress("codes", len(runs), len(runs))
    files = {".csv": cards_csv(views), "-measures.csv": measures_csv(views, field)}
    if changes:
        files |= {"-changes.csv": changes_csv(views, changes), "-between.csv": between_csv(pairs)}
    return Findings(
        title="What the codes stand for",
        introduction=_introduction(views, field, telling),
        tables=_tables(views, pairs, changes, asked, field),
        remarks=[*_data_remarks(runs, views, labels, field), *_card_remarks(views, asked)],
        pictures={".png": codes_png(views, changes, telling)},
        files=files,
        settings={
            "items": f"{catalog.num_items:,}",
            "categories": f"{field}, levels {', '.join(map(str, asked.levels))}" if field else "none",
            "words of": ", ".join(name for name in texts if name in catalog.fields.columns) if words else "nothing",
            "pairs of consecutive training interactions": f"{views[0].pairs:,}",
            "chance": f"mean of {DRAWS} deals, seed {asked.seed}",
        },
    )


def _tables(
    views: Sequence[CodeView], pairs: Sequence[Between], changes: Sequence[Change], asked: CodeStudy, field: str | None
) -> list[StudyTable]:
    tables = [StudyTable("Use of the codes", *use_table(views))]
    if any(views[0].levels[1].agreements.values()):
        tables.append(StudyTable(f"Agreement with the categories (`{field}`)", *agreement_table(views)))
    if any(view.pairs for view in views):
        tables.append(StudyTable("Codes of the next item", *next_table(views)))
    if changes:
        tables.append(StudyTable("Agreement of the runs' codes", *between_table(pairs)))
        changed = change_table(views, changes)
        tables.append(StudyTable(f"Changes of the level-1 codes from `{views[0].name}`", *changed))
    for view, change_ in zip(views[1:], changes, strict=True):
        before, after = views[0].levels[1].cards, view.levels[1].cards
        if before and after:
            title = f"Level-1 codes of `{views[0].name}` and their counterparts in `{view.name}`"
            tables.append(StudyTable(title, *pair_table(before, after, change_, asked.shown)))
    for view in views:
        for of in view.levels.values():
            if of.cards:
                title = f"Codes of level {of.name} of `{view.name}`"
                tables.append(StudyTable(title, *card_table(of.cards[: asked.shown])))
    return tables


def _introduction(views: Sequence[CodeView], field: str | None, telling: int | None) -> list[str]:
    parts = [
        "A code of level 1 is the first code of an item's semantic ID; a code of level 2 is a pair of codes, written "
        "c1-c2, and so on. *Words* are those whose mean TF-IDF over the items of the code is furthest above that over "
        "all items; *most met items* are those with the most training interactions, *training* the share of these "
        "interactions that falls on the code. *Nearest codes* are by the cosine, given in brackets, between the mean "
        "text embeddings of the codes' items, after the mean of all items was taken away."
    ]
    if field is not None:
        parts.append(
            f"Categories are those of the field `{field}`, of an item's first path; items without one are left out. "
            "*Purity* is the share of the items that are of the most frequent category of their code, and *largest*, "
            "the share of the largest category, the least it can be. *Homogeneity* is 1 - H(category | code) / "
            "H(category), *completeness* 1 - H(code | category) / H(code), *NMI* the normalised mutual information "
            "(arithmetic mean). All of them grow with the number of codes, completeness apart. So in brackets stands "
            "*chance*: what the same codes reach when they are dealt out to the items at random. *AMI* is NMI counted "
            "from there, (NMI - chance) / (1 - chance): 0 is expected of codes at random, 1 is the most."
        )
    if telling is not None:
        parts.append(f"The categories of single codes and the picture are of level {telling}.")
    parts.append(
        "*Same code next* is the share of consecutive training interactions of a user whose items have the same code; "
        "*by chance* is that share for two items drawn apart from each other, each as often as it is met in training."
    )
    if len(views) > 1:
        parts.append(
            f"Changes are counted from `{views[0].name}`. A code's *counterpart* is that of a one-to-one matching with "
            "as many items as possible in both. *Another number* says something only where the later training started "
            "from the codes of the first."
        )
    return parts


def _data_remarks(
    runs: Sequence[CodedRun], views: Sequence[CodeView], labels: Labels, field: str | None
) -> Iterator[str]:
    if field is None:
        yield f"The catalogue has no field `{CATEGORIES}`: codes are described by words and items only."
    for level, of in labels.items():
        names = set(of) - {None}
        if len(names) < 2:
            what = f"is `{next(iter(names))}` wherever there is one" if names else "is never given"
            yield f"Level {level} of `{field}` {what}: there is nothing to agree with."
        elif missing := sum(label is None for label in of):
            yield f"Items without a category at level {level} of `{field}`, left out there: {missing:,}."
    for run, view in zip(runs, views, strict=True):
        if run.catalog.text is None:
            yield f"`{run.name}` has no item embeddings: its cards name no nearest codes."
        if not view.pairs:
            yield f"`{run.name}`: no user has two training interactions, so that no item has a next one."


def _card_remarks(views: Sequence[CodeView], asked: CodeStudy) -> Iterator[str]:
    for view in views:
        for of in view.levels.values():
            if of.level in asked.code_levels and len(of.cards) < len(of.sizes):
                left = f"{len(of.sizes) - len(of.cards):,} codes of level {of.level} of `{view.name}`"
                yield f"Without a card, since they have fewer than {asked.min_items} items: {left}."
    most = max(len(of.cards) for view in views for of in view.levels.values())
    if most > asked.shown:
        yield f"Of each level the {asked.shown} largest codes are shown, of up to {most:,}; the CSV file has all cards."
