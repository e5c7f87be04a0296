"""The one evaluator: every model's lists become the same metrics, slices and per-user ranks.

Axis letters: B rows, R places of a list, N answers, I items, U users.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.interactions import IntArray
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.distributed import gather_rows
from recsys_lightning.errors import InputError
from recsys_lightning.metrics.lists import list_metrics
from recsys_lightning.metrics.ranking import Normalizer, ranking_metrics
from recsys_lightning.metrics.ranks import TargetRanks, rank_targets
from recsys_lightning.metrics.semantic_ids import SemanticIdMetrics
from recsys_lightning.metrics.slices import SlicedMetrics, item_slices, user_slices
from recsys_lightning.retrieval.build import IndexSettings
from recsys_lightning.retrieval.recommendations import Recommendations
from recsys_lightning.semantic_ids.trie import PrefixTrie

Kind = Literal["recall", "ndcg", "mrr", "hit_rate", "map"]
COLUMNS = ("", "-unseen")  # all items, and those that the user has not met


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How models are judged.

    Attributes:
        ks: cut-offs of the metrics.
        metrics: of the ranks; see `recsys_lightning.metrics.ranking`.
        ndcg_normalizer: ``ideal`` divides by the best possible DCG, ``comirec`` by the best for the hits found, as the
            public evaluation of ComiRec does.
        popularity_cuts: shares of the catalogue, by training interactions: items within the first are ``head``, all
            others ``tail`` (S14), and those of the tail within the second ``mid``.
        cold_user: users of at most that many interactions are the slice ``cold-user``.
        index: how item vectors are searched.
    """

    ks: tuple[int, ...] = (5, 10, 20, 50)
    metrics: tuple[Kind, ...] = ("recall", "ndcg", "mrr", "hit_rate", "map")
    ndcg_normalizer: Normalizer = "ideal"
    popularity_cuts: tuple[float, float] = (0.2, 0.5)
    cold_user: int = 10
    index: IndexSettings = IndexSettings()

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            raise InputError(f"evaluation.ks={list(self.ks)} must be different cut-offs of 1 or more")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise InputError(f"evaluation.metrics={list(self.metrics)} must be different metrics, at least one")
        if self.cold_user < 1:
            raise InputError(f"evaluation.cold_user={self.cold_user} must be at least 1")


class RankTable(NamedTuple):
    """Where every answer stood in its user's list, one row an answer, by user; for tests that pair users.

    `first` is the best rank the item can have, 0 if that is behind the longest cut-off; `tied` counts the items of its
    score, itself included. The `unseen` columns are those of the list without what the user has met.
    """

    user: Tensor
    item: Tensor
    first: Tensor
    tied: Tensor
    first_unseen: Tensor
    tied_unseen: Tensor


class Evaluator(nn.Module):
    """Counts the users of one evaluation, batch by batch, on any number of processes.

    Args:
        settings: what to count.
        catalog: the items.
        user_lengths: (U,) interactions of each user in the whole data set.
        trie: of the model's semantic IDs, if it generates any.
        thorough: also slices, the lists themselves and semantic IDs; without, only the ranking metrics.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        catalog: Catalog,
        user_lengths: IntArray,
        trie: PrefixTrie | None = None,
        thorough: bool = True,
    ):
        super().__init__()
        self.longest, self.num_users, self.num_items = max(settings.ks), len(user_lengths), catalog.num_items
        self.ranking, self.lists = nn.ModuleDict(), nn.ModuleDict()
        counts = torch.as_tensor(catalog.train_counts)  # (I+1,)
        items = item_slices(counts, settings.popularity_cuts) if thorough else {}
        users = user_slices(torch.as_tensor(user_lengths), settings.cold_user) if thorough else {}
        vectors = catalog.text_embeddings() if thorough and catalog.text is not None else None
        level1: Tensor | None = None  # (I+1,)
        self.semantic_ids: SemanticIdMetrics | None = None
        self.generates = False  # a model can have semantic IDs and generate none
        if thorough and trie is not None:
            level1 = trie.codes_of_leaf[trie.leaf_of_item, 0]
            self.semantic_ids = SemanticIdMetrics(settings.ks, trie.leaf_of_item)
        for column in COLUMNS:
            metrics = ranking_metrics(settings.ks, settings.metrics, settings.ndcg_normalizer)
            self.ranking[f"ranking{column}"] = SlicedMetrics(metrics, items, users)
            if thorough:
                self.lists[f"lists{column}"] = list_metrics(settings.ks, catalog.num_items, counts, vectors, level1)
        self.rows: list[Tensor] = []

    def update(self, batch: SequenceBatch, answered: Recommendations) -> None:
        """Add a batch of users and their lists, which must be long enough once all they have seen is struck.

        Raises:
            InputError: an answer is no item of the catalogue.
        """
        unknown = (batch.target > self.num_items).any(1)  # (B,)
        if bool(unknown.any()):
            row = int(unknown.nonzero()[0, 0])
            raise InputError(
                f"user {int(batch.user[row])} has item {int(batch.target[row].max())} as an answer, but the catalogue "
                f"has {self.num_items} items: the interactions and the items are of different data"
            )
        ranks: dict[str, TargetRanks] = {}
        for column, listed in zip(COLUMNS, (answered, answered.without(batch.seen)), strict=True):
            ranks[column] = rank_targets(listed.item_ids, listed.scores, batch.target)
            self._ranking(column).update(ranks[column], batch.target, batch.user)
            if self.lists:
                self._lists(column).update(listed.item_ids[:, : self.longest])
        if self.semantic_ids is not None and answered.generated is not None:
            leaves, log_probs = answered.generated
            self.semantic_ids.update(leaves, log_probs, batch.target, ranks[""])
            self.generates = True
        answer = ranks[""].relevant  # (B, N)
        columns = [batch.user[:, None].expand_as(answer), batch.target]
        for first, tied, _ in ranks.values():
            # How much longer than that a list is depends on the other users of the batch.
            near = first <= self.longest
            columns += [first * near, tied * near]
        self.rows.append(torch.stack([part[answer] for part in columns], 1))  # (answers, 6)

    def compute(self) -> dict[str, Tensor]:
        """All metrics over all processes, by name below ``<stage>``: ``/recall@10``, ``-unseen/tail/ndcg@5``."""
        found: dict[str, Tensor] = {}
        for column in COLUMNS:
            parts = self._ranking(column).compute()
            if self.lists:
                parts |= self._lists(column).compute()
            found |= {f"{column}/{name}": value for name, value in parts.items()}
        if self.semantic_ids is not None and self.generates:
            found |= {f"/{name}": value for name, value in self.semantic_ids.compute().items()}
        # Users of the data set that were not judged: too few interactions for an answer, or batches left out.
        found["/users_left_out"] = self.num_users - found["/users"]
        return found

    def rank_table(self) -> RankTable:
        """The answers of all processes."""
        table = gather_rows(torch.cat(self.rows)).cpu()
        return RankTable(*table[table[:, 0].argsort(stable=True)].unbind(1))

    def _ranking(self, column: str) -> SlicedMetrics:
        ranking = self.ranking[f"ranking{column}"]
        assert isinstance(ranking, SlicedMetrics)  # noqa: S101 - the dict holds nothing else
        return ranking

    def _lists(self, column: str) -> MetricCollection:
        lists = self.lists[f"lists{column}"]
        assert isinstance(lists, MetricCollection)  # noqa: S101 - the dict holds nothing else
        return lists
