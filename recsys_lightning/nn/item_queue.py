"""A memory of item vectors of earlier batches, as further negatives (MoCo, arXiv:1911.05722; COBRA C6).

Axis letters: U items pushed, Q places of the queue, D width.
"""

import torch
from torch import Tensor, nn


class ItemQueue(nn.Module):
    """The vectors of the last `size` items pushed, each item once, as it was when it was last pushed.

    Its content is part of the state, so a resumed run goes on with the same negatives.

    Args:
        size: Q.
        dim: D.
    """

    ids: Tensor
    vectors: Tensor
    place: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("ids", torch.zeros(size, dtype=torch.long))  # (Q,) 0 is an empty place
        self.register_buffer("vectors", torch.zeros(size, dim))  # (Q, D)
        self.register_buffer("place", torch.zeros((), dtype=torch.long))  # the oldest, written next

    def without(self, item_ids: Tensor) -> Tensor:
        """A copy (n, D) of the vectors of all items in the queue but those of `item_ids` (U,)."""
        return self.vectors[(self.ids != 0) & ~torch.isin(self.ids, item_ids)]

    @torch.no_grad()
    def push(self, item_ids: Tensor, vectors: Tensor) -> None:
        """Put items (U,), each once, with their vectors (U, D) in the place of the oldest; Q of them if there are more.

        On several processes these must be the same, or the queues part.
        """
        size = len(self.ids)
        if len(item_ids) > size:
            # Evenly over what there is: ids stand in order, and the first of them would always be the same.
            chosen = torch.linspace(0, len(item_ids) - 1, size, device=item_ids.device).long()
            item_ids, vectors = item_ids[chosen], vectors[chosen]
        self.ids[torch.isin(self.ids, item_ids)] = 0
        places = (self.place + torch.arange(len(item_ids), device=item_ids.device)) % size
        self.ids[places], self.vectors[places] = item_ids, vectors.to(self.vectors.dtype)
        self.place.copy_((self.place + len(item_ids)) % size)
