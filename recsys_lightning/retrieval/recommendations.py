"""The answer of every model: ranked lists of exact item ids.

Axis letters: B rows, R places of a list, C candidates, S items to strike, M beams.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Generated(NamedTuple):
    """Semantic IDs that a model has generated, best first."""

    leaves: Tensor  # (B, M) leaf of the model's prefix trie; -1 for a semantic ID that no item carries
    log_probs: Tensor  # (B, M)


class Recommendations(NamedTuple):
    """Ranked items of B users, best first, equal scores by lower item id. A list that ends early ends in item 0.

    A model's list is closed under ties: where items share the score of the last place that was asked for, all of them
    are there. So the rank of an item among its equals is known to be open, and metrics can take its expected value.
    """

    item_ids: Tensor  # (B, R) long
    scores: Tensor  # (B, R), -inf where the list has ended
    generated: Generated | None = None  # of models that generate semantic IDs

    def without(self, items: Tensor) -> "Recommendations":
        """The lists once `items` (B, S; 0 is padding) are struck from them; what is left moves up, order is kept."""
        struck = torch.zeros_like(self.item_ids, dtype=torch.bool)  # (B, R)
        for column in torch.split(items, 64, dim=1):  # bounded memory for users who have seen much
            struck |= (self.item_ids[:, :, None] == column[:, None, :]).any(-1)
        struck |= self.item_ids == 0
        order = struck.to(torch.int8).argsort(dim=1, stable=True)  # kept items first
        ids = self.item_ids.masked_fill(struck, 0).gather(1, order)
        return Recommendations(ids, self.scores.masked_fill(struck, -torch.inf).gather(1, order), self.generated)

    def first(self, k: int) -> "Recommendations":
        """The first k places; equals that do not fit are cut, higher item ids first."""
        return Recommendations(self.item_ids[:, :k], self.scores[:, :k], self.generated)


def distinct_items(item_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Group the repeats of items in each row.

    Args:
        item_ids: (B, C) in any order.

    Returns:
        (B, C) each: the distinct items by rising id, 0 behind the last; the order that sorts a row by id; and, in that
        order, which of the distinct items stands there.
    """
    ids, order = item_ids.sort(dim=1)  # repeats stand side by side
    nth = torch.zeros_like(ids)
    torch.cumsum(ids[:, 1:] != ids[:, :-1], dim=1, out=nth[:, 1:])
    return torch.zeros_like(ids).scatter_(1, nth, ids), order, nth


def rank_candidates(item_ids: Tensor, scores: Tensor, k: int) -> Recommendations:
    """The k best candidates of each row, closed under ties.

    Args:
        item_ids: (B, C) long, each item at most once a row, 0 = no candidate.
        scores: (B, C), -inf where there is no candidate.
        k: places wanted.
    """
    width = min(k, scores.shape[1])
    # One more than asked shows whether the last place is tied with the next.
    best, place = scores.topk(min(width + 1, scores.shape[1]), dim=1)
    last = best[:, width - 1 : width]  # (B, 1) score of the k-th
    if bool(((best[:, width:] == last) & (last > -torch.inf)).any()):
        width = int(((scores >= last) & (scores > -torch.inf)).sum(1).max())
        best, place = scores.topk(width, dim=1)
    best, place = best[:, :width], place[:, :width]
    best = best.masked_fill(best < last, -torch.inf)
    ids = item_ids.gather(1, place).masked_fill(best == -torch.inf, 0)
    by_id = ids.argsort(1)
    best, order = best.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return Recommendations(ids.gather(1, by_id).gather(1, order), best)
