"""Soft search of trained SPARC runs under many settings: each is ranked as in a test, and none is trained again.

Axis letters: B rows (users), K interest queries, R places of a list, N answers of a user, I items, D width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from recsys_lightning.analysis.groups import Group, Run, Score, group_runs
from recsys_lightning.analysis.study_run import Progress, StudiedRun, Users
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.errors import InputError
from recsys_lightning.metrics.lists import list_metrics
from recsys_lightning.metrics.ranking import ranking_metrics
from recsys_lightning.metrics.ranks import rank_targets
from recsys_lightning.metrics.slices import SlicedMetrics, item_slices
from recsys_lightning.models.sparc import SPARC, SparcSearch
from recsys_lightning.retrieval.index import Found, ItemIndex
from recsys_lightning.retrieval.recommendations import Recommendations
from recsys_lightning.training.evaluation import COLUMNS

Stage = Literal["val", "test"]
Key = TypeVar("Key")
Values = dict[str, float]
"""Metrics by the evaluator's names: ``/recall@50`` over all items, ``-unseen/recall@50`` without those already met."""


class CatalogueFacts:
    """Tables that all lists of a run are judged by.

    Args:
        catalog: the items.
        level1: (I+1,) level-1 code of each item.
        device: where the lists are.
    """

    def __init__(self, catalog: Catalog, level1: Tensor, device: torch.device) -> None:
        self.num_items = catalog.num_items
        self.train_counts = torch.as_tensor(catalog.train_counts).to(device)  # (I+1,)
        self.tail = item_slices(self.train_counts)["tail"]  # (I+1,) bool
        self.level1 = level1.to(device)
        self.vectors = None if catalog.text is None else catalog.text_embeddings().to(device)  # (I+1, D)


class Tally:
    """Metrics of one setting at one cut-off, named and computed as the evaluator's.

    An evaluator of its own for each setting would hold a copy of the text embeddings each.

    Args:
        facts: of the catalogue.
        k: cut-off.
    """

    def __init__(self, facts: CatalogueFacts, k: int) -> None:
        self.k = k
        self.ranking = [SlicedMetrics(ranking_metrics((k,), ("recall", "ndcg")), {"tail": facts.tail}) for _ in COLUMNS]
        tables = (facts.num_items, facts.train_counts, facts.vectors, facts.level1)
        self.lists = [list_metrics((k,), *tables) for _ in COLUMNS]
        nn.ModuleList([*self.ranking, *self.lists]).to(facts.train_counts.device)

    def update(self, batch: SequenceBatch, answered: Recommendations) -> None:
        """Add a batch of users and their lists, which must be long enough once all they have seen is struck."""
        for at, listed in enumerate((answered, answered.without(batch.seen))):
            ranks = rank_targets(listed.item_ids, listed.scores, batch.target)
            self.ranking[at].update(ranks, batch.target, batch.user)
            self.lists[at].update(listed.item_ids[:, : self.k])

    def compute(self) -> Values:
        """Metrics of all users so far."""
        found: Values = {}
        for column, ranking, lists in zip(COLUMNS, self.ranking, self.lists, strict=True):
            parts = ranking.compute() | lists.compute()
            found |= {f"{column}/{name}": float(value) for name, value in parts.items()}
        return found


class RememberedIndex(ItemIndex):
    """An index that answers the same queries again without a search: settings that differ in the merge alone ask so.

    Args:
        index: that is asked.
    """

    def __init__(self, index: ItemIndex) -> None:
        self.index = index
        self.vectors, self.item_ids, self.similarity = index.vectors, index.item_ids, index.similarity
        self.num_items, self.exact = index.num_items, index.exact
        self._answers: dict[tuple[bool, int], tuple[Tensor, Found]] = {}

    @property
    def table(self) -> Tensor:
        """See `ItemIndex.table`."""
        return self.index.table

    def search(self, queries: Tensor, k: int) -> Found:
        """See `ItemIndex.search`."""
        return self._remembered(queries, k, with_ties=False)

    def search_with_ties(self, queries: Tensor, k: int) -> Found:
        """See `ItemIndex.search_with_ties`."""
        return self._remembered(queries, k, with_ties=True)

    def _remembered(self, queries: Tensor, k: int, with_ties: bool) -> Found:
        known = self._answers.get((with_ties, k))
        if known is None or not torch.equal(known[0], queries):
            found = self.index.search_with_ties(queries, k) if with_ties else self.index.search(queries, k)
            known = self._answers[with_ties, k] = (queries.clone(), found)
        return Found(known[1].scores.clone(), known[1].item_ids.clone())


def measure(
    run: StudiedRun[SPARC], users: Users, searches: Mapping[Key, SparcSearch], k: int, progress: Progress, what: str
) -> dict[Key, Values]:
    """Rank the users with every setting of soft search, as a test does, by the exact index.

    Args:
        run: whose model; its own setting stands again afterwards.
        users: to rank for.
        searches: settings by key.
        k: cut-off of the metrics.
        progress: told of each batch.
        what: what it is told.

    Raises:
        InputError: the model has no codes yet.
    """
    model = run.model
    facts = CatalogueFacts(run.data.catalog, level1_codes(run), run.device)
    tallies = {key: Tally(facts, k) for key in searches}
    own, total = model.search, len(users.batches)
    try:
        with torch.inference_mode():
            index = RememberedIndex(model.build_index())
            for number, batch in enumerate(users.batches):
                progress(what, number, total)
                batch = batch.to(run.device)
                for key, search in searches.items():
                    model.search = search
                    # As long as the lists of a test: k places are left once all that were seen are struck.
                    tallies[key].update(batch, model.recommend(batch, k + batch.seen.shape[1], index))
    finally:
        model.search = own
    progress(what, total, total)
    return {key: tally.compute() for key, tally in tallies.items()}


def level1_codes(run: StudiedRun[SPARC]) -> Tensor:
    """(I+1,) level-1 code of each item; that of padding says nothing.

    Raises:
        InputError: the model has no codes yet.
    """
    trie = run.model.prefix_trie
    if trie is None:
        raise InputError(f"{run.name} has no codes: its training ended before codebooks.warmup_steps")
    return trie.codes_of_leaf[trie.leaf_of_item, 0]


def groups_of(runs: Sequence[StudiedRun[SPARC]]) -> list[tuple[Group, list[StudiedRun[SPARC]]]]:
    """Runs that differ in their seed alone, with what was opened of them.

    Raises:
        InputError: runs are on different items, or two are the same also in their seeds.
    """
    for run in runs:
        if run.data.catalog.raw_ids != runs[0].data.catalog.raw_ids:
            raise InputError(f"{run.name} and {runs[0].name} are on different items: study them apart")
    opened = {run.name: run for run in runs}
    groups = group_runs([Run(run.name, Path(run.name), run.results) for run in runs])
    return [(group, [opened[member.name] for member in group.runs]) for group in groups]


def over_seeds(found: Sequence[Values]) -> dict[str, Score]:
    """Each metric over runs that differ in their seed alone; those that a run lacks are left out."""
    names = [name for name in found[0] if all(name in values for values in found)]
    return {name: Score(tuple(values[name] for values in found)) for name in names}


def shown_score(score: Score | None, digits: int = 4) -> str:
    """``0.0432 ± 0.0011``, mean and standard deviation over seeds; `-` for none."""
    if score is None:
        return "-"
    return f"{score.mean:.{digits}f}" + ("" if score.sd is None else f" ± {score.sd:.{digits}f}")
