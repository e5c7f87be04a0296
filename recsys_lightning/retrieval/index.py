"""An index of item vectors: for each query the items whose vectors score best with it.

Axis letters: B queries, R places of a list, I items, D width. Lists are ordered by score, and within equal scores by
lower item id. Item id 0 with score -inf marks places behind the end of a list.
"""

import logging
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_lightning.errors import InputError

_log = logging.getLogger(__name__)

Similarity = Literal["inner_product", "cosine"]

MAX_PLACES = 1 << 25  # places of one answer; ties that would take more are cut


class Found(NamedTuple):
    """Lists of items, best first, in the order of FAISS: scores, then ids."""

    scores: Tensor  # (B, R) float32, -inf behind the end of a list
    item_ids: Tensor  # (B, R) int64, 0 behind the end of a list


class ItemIndex(ABC):
    """Item vectors that can be searched.

    Attributes:
        vectors: (n, D) float32, those held by this process, as given: cosine does not change them.
        item_ids: (n,) their items, ascending.
        similarity: what a score is.
        num_items: items that a search can find, those of other processes included.
        exact: False if a search may miss items.
    """

    vectors: Tensor
    item_ids: Tensor
    similarity: Similarity
    num_items: int
    exact: bool

    @property
    def dim(self) -> int:
        """Width D of the vectors."""
        return self.vectors.shape[1]

    @property
    @abstractmethod
    def table(self) -> Tensor:
        """(I+1, D) row i is the vector of item i, row 0 is zeros.

        Raises:
            InputError: this index does not hold all items.
        """

    @abstractmethod
    def search(self, queries: Tensor, k: int) -> Found:
        """The k best items of each query.

        Where an approximate index is asked, "best" is among what it finds.

        Args:
            queries: (B, D) on any device; B may be 0.
            k: places R of each list; with fewer items the lists end early.

        Returns:
            Scores and item ids (B, k) on the device of the queries.

        Raises:
            InputError: k below 1, queries of another width, or one that holds NaN or infinity.
        """

    @abstractmethod
    def search_with_ties(self, queries: Tensor, k: int) -> Found:
        """The k best items of each query and all others whose score equals that of the k-th.

        Lists that would take more than `MAX_PLACES` places together are cut there, with a warning.

        Args:
            queries: as in `search`.
            k: as in `search`.

        Returns:
            Scores and item ids (B, R), R >= k: the longest list sets the width. On the device of the queries.

        Raises:
            InputError: as in `search`.
        """


class LocalIndex(ItemIndex):
    """An index within one process; a subclass says how the best places are found.

    Args:
        vectors: (n, D) of any floating type.
        similarity: what a score is.
        first_item: item of the first row; row j is item ``first_item + j``. With 0 the first row is the padding item:
            `vectors` is a table (I+1, D), and `table` is that tensor, without a copy if it is float32.

    Raises:
        InputError: no items, a vector that holds NaN or infinity, or a padding row that is not zero.
    """

    def __init__(self, vectors: Tensor, similarity: Similarity = "inner_product", first_item: int = 1):
        if similarity not in get_args(Similarity):
            raise InputError(f"similarity={similarity!r} must be one of {', '.join(get_args(Similarity))}")
        if vectors.ndim != 2 or vectors.shape[1] < 1 or not vectors.is_floating_point() or first_item < 0:
            raise ValueError(
                f"need floating item vectors (n, D) and first_item >= 0, got {vectors.dtype} of shape "
                f"{tuple(vectors.shape)} and {first_item=}"
            )
        vectors = vectors.detach().float().contiguous()
        self._table: Tensor | None = None
        if first_item == 0:
            if bool(vectors[:1].any()):
                raise InputError("row 0 of a table of item vectors is padding and must be zero")
            self._table, vectors, first_item = vectors, vectors[1:], 1
        if not len(vectors):
            raise InputError("an index needs at least one item; the catalogue is empty")
        bad = _first_bad_row(vectors)
        if bad is not None:
            raise InputError(
                f"the vector of item {first_item + bad} holds NaN or infinity, so it cannot be ranked; "
                "look for where the training diverged"
            )
        self.vectors, self.similarity, self.num_items = vectors, similarity, len(vectors)
        self.item_ids = torch.arange(first_item, first_item + len(vectors), device=vectors.device)
        self._first_item = first_item
        self._limit = self.num_items  # longest list that the back end gives

    @property
    def table(self) -> Tensor:
        """See `ItemIndex.table`."""
        if self._first_item != 1:
            raise all_items_needed()
        if self._table is None:
            self._table = F.pad(self.vectors, (0, 0, 1, 0))
        return self._table

    def search(self, queries: Tensor, k: int) -> Found:
        """See `ItemIndex.search`."""
        asked = self._checked(queries, k)
        found, tied = self._lists(asked, k)
        found = _resized(found, k)
        # In blocks, so that also lists of the whole catalogue stay within bounds: which of many equal items have the
        # lowest ids is known only when all of them are.
        for rows in torch.split(tied, max(1, MAX_PLACES // self.num_items)):
            closed = self._closed(asked[rows], k, MAX_PLACES)
            found.scores[rows], found.item_ids[rows] = closed.scores[:, :k], closed.item_ids[:, :k]
        return Found(found.scores.to(queries.device), found.item_ids.to(queries.device))

    def search_with_ties(self, queries: Tensor, k: int) -> Found:
        """See `ItemIndex.search_with_ties`."""
        asked = self._checked(queries, k)
        found, tied = self._lists(asked, k)
        found = _resized(found, k)
        if len(tied):
            closed = self._closed(asked[tied], k, MAX_PLACES // len(asked))
            found = _resized(found, closed.scores.shape[1])
            found.scores[tied], found.item_ids[tied] = closed
        return Found(found.scores.to(queries.device), found.item_ids.to(queries.device))

    @abstractmethod
    def _top(self, queries: Tensor, k: int) -> Found:
        """Some k best items of each query.

        Args:
            queries: (B, D) float32 on the device of `vectors`, of unit length where the similarity is cosine.
            k: 1 .. `_limit`.

        Returns:
            Scores and item ids (B, k) on that device, scores descending; equal ones in any order and, at the end of a
            list, any of them. Places behind what can be found hold -inf and 0.
        """

    def _checked(self, queries: Tensor, k: int) -> Tensor:
        if k < 1:
            raise InputError(f"k={k}: a list must have at least one place")
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise InputError(f"queries of shape {tuple(queries.shape)} do not fit an index of width {self.dim}")
        queries = queries.detach().to(self.vectors.device, torch.float32)
        bad = _first_bad_row(queries)
        if bad is not None:
            raise InputError(f"query {bad} (counted from 0) holds NaN or infinity, so it cannot be ranked")
        return F.normalize(queries, dim=-1) if self.similarity == "cosine" else queries

    def _lists(self, queries: Tensor, k: int) -> tuple[Found, Tensor]:
        """Lists one place longer than asked, and the rows (.,) where that place may be tied with the one before."""
        if self._limit < self.num_items and k >= self._limit:
            raise InputError(
                f"k={k}: this index gives at most {self._limit - 1} of its {self.num_items} items; "
                "ask for fewer or set index.backend: torch"
            )
        found = self._ordered(queries, min(k + 1, self._limit))
        return found, self._open(found, k).nonzero()[:, 0]

    def _open(self, found: Found, k: int) -> Tensor:
        """(B,) whether items that score as the k-th may stand behind the end of the list."""
        scores, ids = found
        if scores.shape[1] >= self.num_items:
            return torch.zeros_like(ids[:, 0], dtype=torch.bool)
        return (ids[:, -1] > 0) & (scores[:, -1] == scores[:, k - 1])

    def _closed(self, queries: Tensor, k: int, places: int) -> Found:
        """Lists (B, R) with all items that score as the k-th, of at most `places` places together for each query."""
        longest = min(max(places, k), self._limit)
        width = k
        rows = torch.arange(len(queries), device=queries.device)
        answer = _resized(Found(queries.new_empty(len(queries), 0), rows.new_empty(len(queries), 0)), k)
        while len(rows):
            width = min(4 * width, longest)
            found = self._ordered(queries[rows], width)
            open_ = self._open(found, k)
            if width == longest and bool(open_.any()):
                equal = int((found.scores == found.scores[:, k - 1 : k]).sum(1).max())
                _log.warning(
                    "%d or more items have the score of place %d; a list is cut at %d places, "
                    "so which of them are in it is left to chance",
                    *(equal, k, width),
                )
                open_ = torch.zeros_like(open_)
            done = closed_at(Found(found.scores[~open_], found.item_ids[~open_]), k)
            answer = _resized(answer, max(answer.scores.shape[1], done.scores.shape[1]))  # never narrower than before
            done = _resized(done, answer.scores.shape[1])
            answer.scores[rows[~open_]], answer.item_ids[rows[~open_]] = done
            rows = rows[open_]
        return answer

    def _ordered(self, queries: Tensor, k: int) -> Found:
        """What `_top` finds, equal scores by lower id."""
        with torch.no_grad():
            scores, ids = self._top(queries, k)
        broken = ~(scores.isfinite() | (ids == 0)).all(1)
        if bool(broken.any()):
            raise InputError(
                f"a score of query {int(broken.nonzero()[0])} (counted from 0) is not a finite number: its vector or "
                "an item's is too long; look for where the training diverged"
            )
        tied = ((scores[:, 1:] == scores[:, :-1]) & (ids[:, 1:] > 0)).any(1).nonzero()[:, 0]
        if len(tied):
            by_id, order = ids[tied].sort(dim=1)
            scores[tied], best = scores[tied].gather(1, order).sort(dim=1, descending=True, stable=True)
            ids[tied] = by_id.gather(1, best)
        return Found(scores, ids)


def closed_at(found: Found, k: int) -> Found:
    """Ordered lists cut behind the last item that scores as the k-th; none is narrower than k places."""
    found = _resized(found, max(k, found.scores.shape[1]))
    kept = (found.scores >= found.scores[:, k - 1 : k]) & (found.item_ids > 0)  # (B, R), a prefix of each row
    width = max(k, int(kept.sum(1).max()) if len(kept) else 0)
    scores = found.scores.masked_fill(~kept, -torch.inf)[:, :width]
    return Found(scores, found.item_ids.masked_fill(~kept, 0)[:, :width])


def all_items_needed() -> InputError:
    """The refusal to give a part of the items for all."""
    return InputError("this model needs all item vectors on every process: set index.sharded: false")


def _resized(found: Found, width: int) -> Found:
    """Lists cut or filled up to `width` places."""
    more = width - found.scores.shape[1]
    return Found(F.pad(found.scores, (0, more), value=-torch.inf), F.pad(found.item_ids, (0, more)))


def _first_bad_row(x: Tensor) -> int | None:
    """The first row that holds NaN or infinity."""
    if bool(x.sum().isfinite()):  # one cheap pass; the sum of finite numbers may overflow, so no is not yet an answer
        return None
    bad = (~x.isfinite()).any(1).nonzero()
    return int(bad[0]) if len(bad) else None
