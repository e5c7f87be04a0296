"""SASRec: self-attention over the history, one dense vector a user (Kang and McAuley 2018, arXiv:1808.09781).

The baseline without semantic IDs: an embedding an item, and retrieval by nearest vectors.
Axis letters: B rows, T items of a sequence, D width, I items, P positions learned from.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.distributed import row_weight
from recsys_lightning.errors import InputError
from recsys_lightning.losses import cross_entropy
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.nn.transformer import Transformer
from recsys_lightning.retrieval.index import ItemIndex
from recsys_lightning.retrieval.recommendations import Recommendations


class SASRec(Recommender):
    """Predicts the next item of every prefix of a sequence.

    Args:
        catalog: the items.
        dim: D, width of item and user vectors.
        num_layers: transformer blocks.
        num_heads: attention heads.
        dropout: on the input and inside the blocks.
        max_history: longest history in items, that of the data.
        loss: ``cross_entropy`` over the whole catalogue, which later work found much stronger; ``bce`` is the paper's:
            each answer against one item drawn uniformly (section 3.5).
    """

    def __init__(
        self,
        catalog: Catalog,
        dim: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        dropout: float = 0.2,
        max_history: int = 20,
        loss: Literal["cross_entropy", "bce"] = "cross_entropy",
    ):
        super().__init__()
        if dim % num_heads:
            raise InputError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        self.num_items, self.max_history, self.loss = catalog.num_items, max_history, loss
        self.item = nn.Embedding(catalog.num_items + 1, dim, padding_idx=0)
        self.position = nn.Embedding(max_history, dim)
        for table in (self.item, self.position):
            nn.init.normal_(table.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.encoder = Transformer(dim, num_layers, num_heads, 4 * dim, dropout, "causal")

    def losses(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """``next_item``: the mean over positions; each state predicts the item after it."""
        sequence = batch.sequence
        states, targets = self._states(sequence[:, :-1]), sequence[:, 1:]  # (B, T, D), (B, T)
        states, targets = states[targets != 0], targets[targets != 0]  # (P, D), (P,)
        share = row_weight(len(targets), targets.device)
        if self.loss == "cross_entropy":
            return {"next_item": share * cross_entropy(states @ self.item.weight[1:].T, targets - 1)}
        drawn = torch.randint(1, self.num_items + 1, targets.shape, device=targets.device)
        right, wrong = ((states * self.item(items)).sum(-1) for items in (targets, drawn))  # (P,) each
        return {"next_item": -share * (F.logsigmoid(right) + F.logsigmoid(-wrong)).sum() / max(len(targets), 1)}

    def encode_items(self, item_ids: Tensor) -> Tensor:
        """(n, D) the embeddings."""
        vectors: Tensor = self.item(item_ids)
        return vectors

    @torch.no_grad()
    def encode_users(self, batch: SequenceBatch) -> Tensor:
        """(B, D) the state after the last item of each history.

        Raises:
            InputError: a history is empty.
        """
        lengths = batch.history_mask.sum(1)  # (B,)
        if bool((lengths == 0).any()):
            user = int(batch.user[(lengths == 0).nonzero()[0, 0]])
            raise InputError(f"user {user} has an empty history; SASRec knows a user only by his history")
        return self._states(batch.history)[torch.arange(len(lengths), device=lengths.device), lengths - 1]

    def recommend(self, batch: SequenceBatch, k: int, index: ItemIndex) -> Recommendations:
        """The k items whose embeddings have the largest products with the user's state."""
        found = index.search_with_ties(self.encode_users(batch), k)
        return Recommendations(found.item_ids, found.scores)

    def _states(self, sequence: Tensor) -> Tensor:
        """The state after each item of sequences (B, T), padded on the right: (B, T, D)."""
        if sequence.shape[1] > self.max_history:
            raise InputError(
                f"a history of {sequence.shape[1]} items, but the model has positions for {self.max_history}: "
                "set max_history of the model to that of the data"
            )
        embedded = self.item(sequence) * self.item.embedding_dim**0.5 + self.position.weight[: sequence.shape[1]]
        states: Tensor = self.encoder(self.dropout(embedded))[0]
        return states
