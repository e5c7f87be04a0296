"""The contract between a model and everything that trains, evaluates or serves it."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.retrieval.recommendations import Recommendations


class Recommender(nn.Module, ABC):
    """A model that recommends items to users from their histories.

    A subclass takes the `Catalog` as its first constructor argument and its settings as the others; it needs no
    Lightning. Training it by hand is ``sum(model.losses(batch).values()).backward()``.
    """

    @abstractmethod
    def losses(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """The weighted terms of the objective, by name: their sum is what is minimised. Empty if nothing is."""

    @abstractmethod
    def encode_items(self) -> Tensor:
        """(I+1, D) one vector an item, row 0 zeros. Computed once for many calls of `recommend`."""

    @abstractmethod
    def recommend(self, batch: SequenceBatch, k: int, item_vectors: Tensor) -> Recommendations:
        """The k best items for each user by exact item id, seen ones included.

        Args:
            batch: histories; `target` is never looked at.
            k: length of the lists.
            item_vectors: what `encode_items` returned.
        """
