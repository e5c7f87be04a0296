"""The item tower of a two-tower model: everything that is known of an item, in one vector.

SPARC (arXiv:2508.09090) section 3.1. Axis letters: U items asked for, I items, D width, V values of a field.
"""

import torch
from torch import Tensor, nn

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.errors import InputError
from recsys_lightning.nn.item_encoders import ItemEncoder
from recsys_lightning.nn.mlp import MLP

# Vectors that enter inner products start small: scores near 0 are the calibrated start of a logistic loss.
_START = 0.1


class FeatureItemEncoder(ItemEncoder):
    """A sum of what is known of an item: a vector of its own, its text, its categories and its brand; by key an MLP.

    The parts are added, so that none waits for another to be learned; with ``hidden`` an MLP corrects the sum.

    Args:
        catalog: the items; with text embeddings where `text` is set.
        dim: D.
        learned: a learned vector of each item's own.
        text: a linear map of the frozen text embedding.
        fields: text fields whose values are categories, such as ``categories`` and ``brand``: each value has a learned
            vector, and an item gets the mean of those of its values.
        min_count: items that must share a value of a field; a rarer one counts as none.
        hidden: widths of the MLP; none leaves it out.
        dropout: on the text embedding and inside the MLP.

    Raises:
        InputError: nothing is left of an item.
    """

    embeddings: Tensor

    def __init__(
        self,
        catalog: Catalog,
        dim: int,
        learned: bool = True,
        text: bool = False,
        fields: tuple[str, ...] = (),
        min_count: int = 5,
        hidden: tuple[int, ...] = (),
        dropout: float = 0.1,
    ):
        super().__init__()
        if not (learned or text or fields):
            raise InputError("an item tower needs one of learned, text and fields")
        self.dim = dim
        self.item: nn.Embedding | None = None
        if learned:
            self.item = nn.Embedding(catalog.num_items + 1, dim, padding_idx=0)
            nn.init.normal_(self.item.weight, std=_START)
        self.project: nn.Linear | None = None
        if text:
            embeddings = catalog.text_embeddings()  # (I+1, text width)
            # Encoders differ in scale: bring all to unit variance around the catalogue's mean. Not in checkpoints.
            centred = embeddings[1:] - embeddings[1:].mean(0)
            embeddings[1:] = centred / centred.std().clamp_min(1e-8)
            self.register_buffer("embeddings", embeddings, persistent=False)
            self.project = nn.Linear(embeddings.shape[1], dim)
            nn.init.normal_(self.project.weight, std=_START * embeddings.shape[1] ** -0.5)
            nn.init.zeros_(self.project.bias)
        self.dropout = nn.Dropout(dropout)
        self.fields = nn.ModuleList()
        for number, name in enumerate(fields):
            values = catalog.categorical(name, min_count)
            self.register_buffer(f"values{number}", values.item, persistent=False)  # (I+1, V)
            table = nn.EmbeddingBag(len(values.values) + 1, dim, mode="mean", padding_idx=0)
            nn.init.normal_(table.weight[1:], std=_START)
            self.fields.append(table)
        self.mlp = MLP([dim, *hidden, dim], dropout) if hidden else None
        self.norm = nn.LayerNorm(dim) if hidden else None

    def forward(self, item_ids: Tensor) -> Tensor:
        """(U,) to (U, D)."""
        vectors = torch.zeros(len(item_ids), self.dim, device=item_ids.device)
        if self.item is not None:
            vectors = vectors + self.item(item_ids)
        if self.project is not None:
            vectors = vectors + self.project(self.dropout(self.embeddings[item_ids]))
        for number, table in enumerate(self.fields):
            vectors = vectors + table(self.get_buffer(f"values{number}")[item_ids])
        if self.mlp is not None and self.norm is not None:
            vectors = vectors + self.mlp(self.norm(vectors))
        return vectors
