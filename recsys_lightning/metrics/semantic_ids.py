"""Scores of generated semantic IDs beside those of items, and by how much they flatter.

Shapes: B users, M generated semantic IDs, N answers of a user, I items.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from recsys_lightning.metrics.ranks import TargetRanks, rank_targets
from recsys_lightning.metrics.states import SummedMetric, sorted_ks
from recsys_lightning.metrics.ties import expected_ndcg, expected_recall, tie_groups


class SemanticIdMetrics(SummedMetric):
    """Recall and NDCG where a hit is a generated semantic ID that equals an answer's, as tuple-level evaluators count.

    Items that share a semantic ID are one here, which flatters every model with collisions; hence the ratio to the
    recall of items. Answers that share a semantic ID count once. Ties in log probability are ranked by expected value.

    Args:
        ks: cut-offs.
        leaf_of_item: (I+1,) long number of each item's semantic ID, -1 for padding.

    Raises:
        InputError: the ks are no cut-offs.
        ValueError: an item has no semantic ID, or padding has one.
    """

    recall: Tensor  # (len(ks),) float64 sums over users
    ndcg: Tensor  # (len(ks),) float64
    item_recall: Tensor  # (len(ks),) float64
    num_users: Tensor  # () long
    num_generated: Tensor  # () long
    num_invalid: Tensor  # () long
    leaf_of_item: Tensor

    def __init__(self, ks: Sequence[int], leaf_of_item: Tensor) -> None:
        super().__init__()
        self.ks = sorted_ks(ks)
        if leaf_of_item[0] != -1 or (leaf_of_item[1:] < 0).any():
            raise ValueError("leaf_of_item needs -1 for padding, at index 0, and a leaf of 0 or more for every item")
        self.register_buffer("leaf_of_item", leaf_of_item, persistent=False)
        for name in ("recall", "ndcg", "item_recall"):
            self.add_sum(name, len(self.ks))
        for name in ("num_users", "num_generated", "num_invalid"):
            self.add_sum(name, dtype=torch.long)

    def update(self, generated_leaves: Tensor, log_probs: Tensor, target: Tensor, item_ranks: TargetRanks) -> None:
        """Add the users of a batch.

        Args:
            generated_leaves: (B, M) long, best first; -1 = a semantic ID that no item carries.
            log_probs: (B, M), non-increasing; -inf where nothing more was generated.
            target: (B, N) long item ids of the answers, 0 = padding.
            item_ranks: of the same answers among the recommended items; answers that do not count there do not here.

        Raises:
            ValueError: the shapes do not fit.
            InputError: log probabilities hold NaN.
        """
        if target.shape != item_ranks.relevant.shape:
            shapes = [tuple(tensor.shape) for tensor in (target, item_ranks.relevant)]
            raise ValueError(f"need target and item_ranks of one shape (B, N), got {shapes}")
        # As item ids: 0 is no semantic ID, 1 one that no item carries (it takes up room), leaf + 2 all others.
        exists = log_probs > -torch.inf  # (B, M)
        ids = torch.where(exists, generated_leaves + 2, 0)
        answers = torch.where(item_ranks.relevant, self.leaf_of_item[target] + 2, 0)  # (B, N)
        groups, item_groups = tie_groups(rank_targets(ids, log_probs, answers)), tie_groups(item_ranks)
        self.recall += torch.stack([expected_recall(groups, k).sum() for k in self.ks])
        self.ndcg += torch.stack([expected_ndcg(groups, k).sum() for k in self.ks])
        self.item_recall += torch.stack([expected_recall(item_groups, k).sum() for k in self.ks])
        self.num_users += (groups.num_relevant > 0).sum()
        self.num_generated += exists.sum()
        self.num_invalid += (exists & (generated_leaves < 0)).sum()

    def compute(self) -> dict[str, Tensor]:
        """``semantic-id/recall@k``, ``semantic-id/ndcg@k``, ``semantic-id/inflation@k`` and ``semantic-id/invalid``.

        Inflation is recall of semantic IDs / recall of items over the same users, left out where no item was found.
        Invalid is the share of generated semantic IDs that no item carries, left out where nothing was generated.
        Recall and NDCG are left out if no user had an answer.
        """
        values = {}
        sums = zip(self.ks, self.recall, self.ndcg, self.item_recall, strict=True)
        for k, recall, ndcg, item_recall in sums:
            if self.num_users > 0:
                values[f"semantic-id/recall@{k}"] = recall / self.num_users
                values[f"semantic-id/ndcg@{k}"] = ndcg / self.num_users
            if item_recall > 0:
                values[f"semantic-id/inflation@{k}"] = recall / item_recall
        if self.num_generated > 0:
            values["semantic-id/invalid"] = self.num_invalid.double() / self.num_generated
        return values
