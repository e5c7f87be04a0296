"""The baseline that every model must beat: the most met items, the same for everyone."""

import torch
from torch import Tensor

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.retrieval.index import ItemIndex
from recsys_lightning.retrieval.recommendations import Recommendations


class Popularity(Recommender):
    """Ranks items by their number of training interactions. Has nothing to train."""

    catalogue_facts = ("counts",)
    counts: Tensor

    def __init__(self, catalog: Catalog):
        super().__init__()
        self.num_items = catalog.num_items
        self.register_buffer("counts", torch.as_tensor(catalog.train_counts, dtype=torch.int64))  # (I+1,)

    def losses(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Nothing to minimise."""
        return {}

    def encode_items(self, item_ids: Tensor) -> Tensor:
        """(n, 1) the counts."""
        return self.counts[item_ids, None].float()

    def recommend(self, batch: SequenceBatch, k: int, index: ItemIndex) -> Recommendations:
        """The k most met items: those with the largest product with the user vector 1."""
        found = index.search_with_ties(index.vectors.new_ones(1, 1), k)
        rows = len(batch)
        return Recommendations(found.item_ids.expand(rows, -1), found.scores.expand(rows, -1))
