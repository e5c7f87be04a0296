"""An approximate index that is checked against the exact one while it is used."""

import torch
from torch import Tensor

from recsys_lightning.distributed import gather_rows
from recsys_lightning.retrieval.index import Found, ItemIndex
from recsys_lightning.retrieval.sharded import ShardedIndex


class MeasuredIndex(ItemIndex):
    """Answers with an approximate index and counts how much of the exact answer it finds.

    Attributes:
        found: items of the exact lists of k that are in the approximate lists of k, so far, of this process's queries.
        wanted: items of those exact lists.

    Args:
        approximate: gives the answers.
        exact: the same items, searched exactly; asked for the first queries only.
        limit: of how many queries. Over several processes their queries count together, and a search is measured whole
            or not at all, so that all of them ask.

    Raises:
        ValueError: the two do not hold the same items.
    """

    def __init__(self, approximate: ItemIndex, exact: ItemIndex, limit: int = 1024):
        if not torch.equal(approximate.item_ids, exact.item_ids) or approximate.similarity != exact.similarity:
            raise ValueError("the two indexes must hold the same items under the same similarity")
        self.approximate, self._exact, self.limit = approximate, exact, limit
        self.vectors, self.item_ids = approximate.vectors, approximate.item_ids
        self.similarity, self.num_items, self.exact = approximate.similarity, approximate.num_items, approximate.exact
        self.found, self.wanted = 0, 0
        self._asked = 0

    @property
    def table(self) -> Tensor:
        """See `ItemIndex.table`."""
        return self.approximate.table

    @property
    def recall(self) -> float:
        """Share of the exact lists that was found; NaN before the first search."""
        return self.found / self.wanted if self.wanted else float("nan")

    def search(self, queries: Tensor, k: int) -> Found:
        """See `ItemIndex.search`."""
        answer = self.approximate.search(queries, k)
        self._measure(queries, k, answer)
        return answer

    def search_with_ties(self, queries: Tensor, k: int) -> Found:
        """See `ItemIndex.search_with_ties`."""
        answer = self.approximate.search_with_ties(queries, k)
        self._measure(queries, k, answer)
        return answer

    def _measure(self, queries: Tensor, k: int, answer: Found) -> None:
        if self._asked >= self.limit:
            return
        if isinstance(self._exact, ShardedIndex):
            self._asked += int(gather_rows(torch.tensor([len(queries)])).sum())
        else:
            queries = queries[: self.limit - self._asked]
            self._asked += len(queries)
        wanted = self._exact.search(queries, k).item_ids
        rows = torch.arange(len(queries), device=queries.device)[:, None] * (self.num_items + 1)
        got, wanted = answer.item_ids[: len(queries), :k], wanted[wanted > 0] + rows.expand_as(wanted)[wanted > 0]
        self.wanted += len(wanted)
        self.found += int(torch.isin(wanted, (got + rows)[got > 0]).sum())
