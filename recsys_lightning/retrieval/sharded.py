"""One index over several processes, each of which holds a slice of the items.

Axis letters: B queries, R places of a list, W processes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_lightning.distributed import gather_rows, rank, world_size
from recsys_lightning.errors import InputError
from recsys_lightning.retrieval.index import Found, ItemIndex, all_items_needed, closed_at


class ShardedIndex(ItemIndex):
    """Searches the slices of all processes for the queries of all, and gives each process its own answers.

    The answer is that of one process with all items: ids and scores, ties included, as far as the platform's matrix
    product gives the same score for a vector in a smaller matrix; otherwise up to its rounding.

    Every process must make it, and call `search` or `search_with_ties` together with the others, each with its own
    number of queries, which may be none, and its own k. A query that is refused is refused on every process, counted
    from the first query of rank 0.

    Args:
        local: this process's slice: together the slices are the items 1 .. I, in the order of the ranks.

    Raises:
        ValueError: they are not, or are of different width or similarity; on every process.
    """

    def __init__(self, local: ItemIndex):
        self.local = local
        self.vectors, self.item_ids, self.similarity = local.vectors, local.item_ids, local.similarity
        self.exact = local.exact
        first, last = int(local.item_ids[0]), int(local.item_ids[-1])
        shape = [first, last, local.dim, int(local.similarity == "cosine")]
        spans = gather_rows(torch.tensor([shape])).tolist()  # (W, 4)
        starts = [1, *(span[1] + 1 for span in spans[:-1])]
        if [span[0] for span in spans] != starts or any(span[2:] != spans[0][2:] for span in spans):
            held = ", ".join(f"{span[0]}..{span[1]} of width {span[2]}" for span in spans)
            raise ValueError(f"shards must hold items 1 .. I in the order of the ranks, all alike; they hold {held}")
        self.num_items = spans[-1][1]

    @property
    def table(self) -> Tensor:
        """See `ItemIndex.table`; only one process holds all items."""
        if world_size() > 1:
            raise all_items_needed()
        return self.local.table

    def search(self, queries: Tensor, k: int) -> Found:
        """See `ItemIndex.search`."""
        found = self._merged(self.local.search, queries, k)
        return Found(found.scores[:, :k], found.item_ids[:, :k])

    def search_with_ties(self, queries: Tensor, k: int) -> Found:
        """See `ItemIndex.search_with_ties`."""
        return closed_at(self._merged(self.local.search_with_ties, queries, k), k)

    def _merged(self, search: Callable[[Tensor, int], Found], queries: Tensor, k: int) -> Found:
        """The lists of all slices for this process's queries, in one order: (B, W R).

        The k best of all, under any order of the items, are among the k best of each slice; and a score that ties with
        the k-th of all is at least the k-th of its slice, so it is in the slice's closed list.
        """
        # No process raises alone: it would leave the others waiting.
        asked = gather_rows(torch.tensor([[len(queries), k]])).tolist()  # (W, 2)
        every, smallest = gather_rows(queries), min(places for _, places in asked)
        refusal: InputError | None = None
        try:
            found = search(every, smallest if smallest < 1 else max(places for _, places in asked))
        except InputError as error:
            refusal, found = error, Found(every[:, :0], self.item_ids[:0].expand(len(every), 0))
        widths = gather_rows(torch.tensor([-1 if refusal else found.scores.shape[1]]))
        if bool((widths < 0).any()):
            raise refusal or InputError("the search was refused on another process, which says why")
        more = int(widths.max()) - found.scores.shape[1]
        scores = gather_rows(F.pad(found.scores, (0, more), value=-torch.inf))  # (W sum B, R)
        ids = gather_rows(F.pad(found.item_ids, (0, more)))
        start = sum(count for count, _ in asked[: rank()])
        mine = slice(start, start + len(queries))
        scores, ids = (
            x.view(len(asked), len(every), x.shape[1])[:, mine].transpose(0, 1).flatten(1) for x in (scores, ids)
        )
        # Ranks hold ascending ids and each list has equal scores by lower id, so a stable sort keeps them so.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return Found(scores, ids.gather(1, order))
