"""The answer of every model: ranked lists of exact item ids."""

from typing import NamedTuple

import torch
from torch import Tensor


class Recommendations(NamedTuple):
    """Ranked items of B users, best first. A list that is shorter than k ends in item 0 with score -inf."""

    item_ids: Tensor  # (B, k)
    scores: Tensor  # (B, k)

    def without(self, items: Tensor, k: int) -> "Recommendations":
        """The first k of each list once `items` (B, S; 0 is padding) are struck from it; order is kept."""
        struck = torch.zeros_like(self.item_ids, dtype=torch.bool)  # (B, R)
        for column in torch.split(items, 64, dim=1):  # bounded memory for users who have seen much
            struck |= (self.item_ids[:, :, None] == column[:, None, :]).any(-1)
        struck |= self.item_ids == 0
        order = struck.to(torch.int8).argsort(dim=1, stable=True)[:, :k]  # kept items first
        ids = self.item_ids.masked_fill(struck, 0).gather(1, order)
        return Recommendations(ids, self.scores.masked_fill(struck, -torch.inf).gather(1, order))
