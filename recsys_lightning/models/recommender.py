"""The contract between a model and everything that trains, evaluates or serves it."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.nn.quantize import ResidualQuantizer
from recsys_lightning.retrieval.build import IndexSettings, build_index
from recsys_lightning.retrieval.index import ItemIndex, Similarity
from recsys_lightning.retrieval.recommendations import Recommendations
from recsys_lightning.semantic_ids.trie import PrefixTrie


class Recommender(nn.Module, ABC):
    """A model that recommends items to users from their histories.

    A subclass takes the `Catalog` as its first constructor argument and its settings as the others; it needs no
    Lightning. Training it by hand is ``sum(model.losses(batch).values()).backward()``.

    Attributes:
        num_items: I of the catalogue.
        similarity: of a user's vectors and the items', by which an index finds items.
        catalogue_facts: names of buffers that are facts of the catalogue and are never learned; an audit recounts them.
    """

    num_items: int
    similarity: ClassVar[Similarity] = "inner_product"
    catalogue_facts: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def losses(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """The weighted terms of the objective, by name: their sum is what is minimised. Empty if nothing is."""

    @abstractmethod
    def encode_items(self, item_ids: Tensor) -> Tensor:
        """The vectors (n, D) of items (n,) in 1..I."""

    @abstractmethod
    def recommend(self, batch: SequenceBatch, k: int, index: ItemIndex) -> Recommendations:
        """The k best items for each user by exact item id, seen ones included; closed under ties.

        Args:
            batch: histories; `target` is never looked at.
            k: items wanted; lists are longer where items tie with the k-th, shorter where a model finds no more.
            index: of the vectors that `encode_items` gives, by `similarity`.
        """

    @property
    def prefix_trie(self) -> PrefixTrie | None:
        """The trie of the semantic IDs that the model generates; None if it generates none."""
        return None

    @property
    def quantizer(self) -> ResidualQuantizer | None:
        """The codebooks that are trained with the model; None of a model that has none."""
        return None

    def item_codes(self) -> Tensor:
        """Codes (I, L) of the items 1..I as the quantizer stands.

        Raises:
            RuntimeError: the model trains no codebooks.
        """
        raise RuntimeError(f"{type(self).__name__} trains no codebooks")

    @torch.no_grad()
    def item_table(self, first: int = 1, stop: int | None = None, chunk: int = 2048) -> Tensor:
        """The vectors of items ``first .. stop - 1``, by default all, below a row of zeros for padding: (n + 1, D)."""
        device = next((tensor.device for tensor in (*self.parameters(), *self.buffers())), None)
        ids = torch.arange(first, self.num_items + 1 if stop is None else stop, device=device)
        vectors = torch.cat([self.encode_items(part) for part in torch.split(ids, chunk)])
        return torch.cat([torch.zeros_like(vectors[:1]), vectors])

    def build_index(self, settings: IndexSettings = IndexSettings()) -> ItemIndex:
        """An index of all items, for `recommend`."""
        return build_index(self.item_table(), settings, self.similarity, first_item=0)
