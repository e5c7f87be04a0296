"""Exact search in plain torch, on any device.

Axis letters: B queries, I items, D width, G places of a group, M groups.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_lightning.retrieval.index import Found, LocalIndex, Similarity

SCORES = 1 << 22  # floats of one block of scores: 16 MiB, which stays near the processor
CHUNK = 1 << 17  # most items of one block
CACHED = 256  # item vectors of one small product
FEW = 8  # queries up to which reading the item vectors takes longer than multiplying them


class TorchIndex(LocalIndex):
    """Scores every item, a block of queries and items at a time, and keeps the best so far.

    Products are full float32 whatever autocast or the matmul precision of torch say. Equal vectors have equal scores
    as far as the matrix product of the platform gives equal results for equal columns. Beyond the answer it needs
    about ``8 * scores_at_once`` bytes; cosine keeps a second, normalised copy of the vectors.

    Args:
        vectors: (n, D) on the device where the search is to run.
        similarity: what a score is.
        first_item: see `LocalIndex`.
        scores_at_once: floats of one block of scores.
    """

    exact = True

    def __init__(
        self,
        vectors: Tensor,
        similarity: Similarity = "inner_product",
        first_item: int = 1,
        scores_at_once: int = SCORES,
    ):
        super().__init__(vectors, similarity, first_item)
        if scores_at_once < 1:
            raise ValueError(f"scores_at_once={scores_at_once} must be at least 1")
        self._scores_at_once = scores_at_once
        self._rows = F.normalize(self.vectors, dim=-1) if similarity == "cosine" else self.vectors  # (n, D)

    def _top(self, queries: Tensor, k: int) -> Found:
        num_rows = max(1, self._scores_at_once // max(k, min(self.num_items, 1 << 14)))
        blocks = torch.split(queries, num_rows)
        width = min(CHUNK, max(1, self._scores_at_once // min(num_rows, max(1, len(queries)))))
        width = -(-self.num_items // -(-self.num_items // width))  # chunks of nearly equal size
        buffer = queries.new_empty(len(blocks[0]), width)
        with full_precision(queries.device):
            found = [self._top_of_block(block, k, buffer[: len(block)]) for block in blocks]
        return Found(torch.cat([f.scores for f in found]), torch.cat([f.item_ids for f in found]))

    def _top_of_block(self, queries: Tensor, k: int, buffer: Tensor) -> Found:
        """The running best of all chunks of items; `buffer` (B, chunk) takes the scores."""
        best = Found(queries.new_empty(len(queries), 0), self.item_ids.new_empty(len(queries), 0))
        for start in range(0, self.num_items, buffer.shape[1]):
            items = self._rows[start : start + buffer.shape[1]]  # (c, D)
            scores = buffer[:, : len(items)]
            multiply(queries, items, scores)
            values, places = best_places(scores, min(k, len(items)))
            ids = places + (self._first_item + start)
            if start:
                values, ids = torch.cat([best.scores, values], 1), torch.cat([best.item_ids, ids], 1)
                values, order = values.topk(min(k, values.shape[1]), dim=1)
                ids = ids.gather(1, order)
            best = Found(values, ids)
        return best


def multiply(queries: Tensor, items: Tensor, out: Tensor) -> None:
    """``queries (B, D) @ items (c, D).T`` into `out` (B, c).

    With few queries on a CPU the time should go into reading the items, but a plain product first copies them about.
    As many small products, each over items that stay in the cache, four queries cost little more than one.
    """
    blocks = len(items) // CACHED if len(queries) <= FEW and queries.device.type == "cpu" else 0
    size = CACHED * blocks
    if blocks:
        batch = torch.matmul(queries, items[:size].view(blocks, CACHED, -1).mT)  # (blocks, B, CACHED)
        out[:, :size].view(-1, blocks, CACHED).copy_(batch.transpose(0, 1))
    if blocks and size < len(items):
        # A few items alone would go another way through the library, with other rounding: equal items could differ.
        torch.mm(queries, items[-CACHED:].T, out=out[:, -CACHED:])
    elif not blocks and len(queries) == 1:
        out.copy_(torch.mm(queries.repeat(2, 1), items.T)[:1])  # and so would a lone query over a few items
    elif not blocks:
        torch.mm(queries, items.T, out=out)


def best_places(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending, and their places (B, k): `Tensor.topk`, faster on long rows.

    The k largest lie in the k groups of columns with the largest maxima: were one elsewhere, each of those k groups
    would hold one at least as large. Maxima are taken by vector instructions, and `topk` sees a fraction of the row.

    Args:
        scores: (B, c).
        k: 1 .. c.
    """
    num_columns = scores.shape[1]
    size = 1 << (max(1, num_columns // k).bit_length() // 2)  # G, near the square root of c / k
    if size < 4:
        best = scores.topk(k, dim=1)
        return best.values, best.indices
    count = num_columns // size  # M; columns j, j + M, j + 2 M, ... form group j
    groups = scores[:, : size * count].view(-1, size, count).amax(1).topk(k, dim=1, sorted=False).indices  # (B, k)
    strides = torch.arange(0, size * count, count, device=scores.device)  # (G,)
    rest = torch.arange(size * count, num_columns, device=scores.device).expand(len(scores), -1)
    columns = torch.cat([(groups[:, None] + strides[:, None]).flatten(1), rest], 1)  # (B, G k + rest)
    values, order = scores.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, order)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in float32 proper, also under autocast and where torch may round to TF32 or bfloat16."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through `torch.backends`: torch refuses a mixture of the two, so that is left alone
        before = "highest"
    try:
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)
