"""The baseline that every model must beat: the most met items, the same for everyone."""

import torch
from torch import Tensor

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.retrieval.recommendations import Recommendations


class Popularity(Recommender):
    """Ranks items by their number of training interactions; equal counts by lower id. Has nothing to train."""

    counts: Tensor

    def __init__(self, catalog: Catalog):
        super().__init__()
        self.register_buffer("counts", torch.as_tensor(catalog.train_counts, dtype=torch.int64))  # (I+1,)

    def losses(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Nothing to minimise."""
        return {}

    def encode_items(self) -> Tensor:
        """(I+1, 1) the counts."""
        return self.counts[:, None].float()

    def recommend(self, batch: SequenceBatch, k: int, item_vectors: Tensor) -> Recommendations:
        """The k most met items."""
        scores, order = item_vectors[1:, 0].sort(descending=True, stable=True)
        k = min(k, len(order))
        rows = len(batch)
        return Recommendations((order[:k] + 1).expand(rows, k), scores[:k].expand(rows, k))
