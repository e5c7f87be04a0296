"""What `recsys study codes` reports: the meaning of level-1 codes, and how it differs between trainings."""

from collections.abc import Sequence

import torch

from recsys_lightning.analysis.study_report import Findings, StudyTable
from recsys_lightning.analysis.study_run import Progress, StudiedRun
from recsys_lightning.analysis.study_sparc_cards import Words, code_cards, item_words
from recsys_lightning.analysis.study_sparc_codes import CATEGORIES, Ints, agreement, category_labels, change
from recsys_lightning.analysis.study_sparc_codes_tables import (
    CodeView,
    agreement_table,
    card_table,
    cards_csv,
    change_table,
    changes_csv,
    measures_csv,
    pair_table,
    use_table,
)
from recsys_lightning.errors import InputError
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.semantic_ids.usage import code_usage

Labels = dict[int, list[str | None]]
"""Category of each item by level."""


def code_study(
    runs: Sequence[StudiedRun[Recommender]],
    field: str | None,
    levels: Sequence[int],
    text_fields: Sequence[str],
    shown: int,
    progress: Progress,
) -> Findings:
    """Describe the level-1 codes of runs, and set each later run against the first.

    Args:
        runs: that give items codes, on the same items.
        field: of the catalogue, that holds the categories; None takes ``categories`` if there is such a field.
        levels: of the categories, from 1; cards show the first of them with two different categories.
        text_fields: whose words are counted; those that the catalogue lacks are skipped.
        shown: codes in the tables, the largest; the CSV file has all.
        progress: told of each step.

    Raises:
        InputError: a run gives no codes, runs are on different items, or the catalogue has no such fields.
    """
    from recsys_lightning.analysis.study_sparc_codes_figure import codes_png

    if not levels or len(set(levels)) < len(levels):
        raise InputError(f"--levels {' '.join(map(str, levels))}: need different levels, at least one")
    fields = runs[0].data.catalog.fields
    if field is None and CATEGORIES in fields.columns:
        field = CATEGORIES
    labels: Labels = {level: category_labels(fields, field, level) for level in levels} if field else {}
    telling = next((level for level, of in labels.items() if len(set(of) - {None}) > 1), None)
    words = item_words(fields, text_fields)
    views = [_view(run, at, runs, words, labels, telling, progress) for at, run in enumerate(runs)]
    changes = [change(views[0].codes, view.codes) for view in views[1:]]
    progress("codes", len(runs), len(runs))
    tables = [StudyTable("Use of the codes", *use_table(views))]
    if labels:
        tables.append(StudyTable(f"Agreement with the categories (`{field}`)", *agreement_table(views)))
    if changes:
        tables.append(StudyTable(f"Changes from `{views[0].name}`", *change_table(views, changes)))
        for view, change_ in zip(views[1:], changes, strict=True):
            title = f"Codes of `{views[0].name}` and their counterparts in `{view.name}`"
            tables.append(StudyTable(title, *pair_table(views[0], view, change_, shown)))
    else:
        tables.append(StudyTable(f"Codes of `{views[0].name}`", *card_table(views[0], shown)))
    files = {".csv": cards_csv(views), "-measures.csv": measures_csv(views, field)}
    if changes:
        files["-changes.csv"] = changes_csv(views, changes)
    return Findings(
        title="What the level-1 codes stand for",
        introduction=_introduction(views[0].name, len(views) > 1, field, telling),
        tables=tables,
        remarks=_remarks(views, labels, field, shown),
        pictures={".png": codes_png(views, changes, telling)},
        files=files,
        settings={
            "items": f"{len(views[0].codes):,}",
            "categories": f"{field}, levels {', '.join(map(str, levels))}" if field else "none",
            "words of": ", ".join(name for name in text_fields if name in fields.columns),
        },
    )


def level1_codes(run: StudiedRun[Recommender]) -> tuple[Ints, int]:
    """Level-1 codes (I,) of items 1 .. I, and how many codes there are.

    Raises:
        InputError: the model gives items no codes.
    """
    with torch.inference_mode():
        trie = run.model.prefix_trie
        if trie is None:
            raise InputError(f"{run.name} has no semantic IDs: there are no codes to study")
        return trie.codes_of_leaf[trie.leaf_of_item[1:], 0].cpu().numpy(), trie.num_codes


def _view(
    run: StudiedRun[Recommender],
    at: int,
    runs: Sequence[StudiedRun[Recommender]],
    words: Words,
    labels: Labels,
    telling: int | None,
    progress: Progress,
) -> CodeView:
    progress("codes", at, len(runs))
    if run.data.catalog.raw_ids != runs[0].data.catalog.raw_ids:
        raise InputError(f"{run.name} and {runs[0].name} are on different items: study them apart")
    codes, num_codes = level1_codes(run)
    cards = code_cards(run.data.catalog, codes, num_codes, words, None if telling is None else labels[telling])
    perplexity = float(code_usage(torch.from_numpy(codes)[:, None], num_codes).perplexity)
    agreements = {level: agreement(codes, of) for level, of in labels.items()}
    return CodeView(run.name, codes, num_codes, perplexity, cards, agreements)


def _introduction(first: str, several: bool, field: str | None, telling: int | None) -> list[str]:
    parts = [
        "Each code of level 1 with its items. *Words* are those whose mean TF-IDF over the items of the code is "
        "furthest above that over all items; *most met items* are those with the most training interactions, "
        "*training* the share of these interactions that falls on the code."
    ]
    if field is not None:
        parts.append(
            f"Categories are those of the field `{field}`, of an item's first path; items without one are left out. "
            "*Purity* is the share of the items that are of the most frequent category of their code; it grows with "
            "the number of codes, and *largest*, the share of the largest category, is the least it can be. *NMI* is "
            "the normalised mutual information (arithmetic mean), *AMI* the same adjusted for chance, *homogeneity* "
            "1 - H(category | code) / H(category)."
        )
    if telling is not None:
        parts.append(f"The categories of single codes and the picture are of level {telling}.")
    if several:
        parts.append(
            f"Changes are counted from `{first}`. A code's *counterpart* is that of a one-to-one matching with as many "
            "items as possible in both. *Another number* says something only where the later training started from "
            "the codes of the first."
        )
    return parts


def _remarks(views: Sequence[CodeView], labels: Labels, field: str | None, shown: int) -> list[str]:
    remarks = []
    if field is None:
        remarks.append(f"The catalogue has no field `{CATEGORIES}`: codes are described by words and items only.")
    for level, of in labels.items():
        names = set(of) - {None}
        if len(names) < 2:
            what = f"is `{next(iter(names))}` wherever there is one" if names else "is never given"
            remarks.append(f"Level {level} of `{field}` {what}: there is nothing to agree with.")
        elif missing := sum(label is None for label in of):
            remarks.append(f"Items without a category at level {level} of `{field}`, left out there: {missing:,}.")
    most = max(len(view.cards) for view in views)
    if most > shown:
        remarks.append(f"The {shown} largest of {most} codes are shown; the CSV file has all.")
    return remarks
