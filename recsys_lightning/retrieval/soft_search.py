"""Soft search: one list of items for a user who has several interest vectors.

Axis letters: B rows (users), K interest queries, N items found a query, R = K N.
"""

import torch
from torch import Tensor

from recsys_lightning.retrieval.index import Found, ItemIndex
from recsys_lightning.retrieval.recommendations import distinct_items


def soft_search(index: ItemIndex, queries: Tensor, k: int, per_query: int | None = None) -> Found:
    """The k best items of each user, an item's score being its best over the user's K interest queries.

    SPARC (arXiv:2508.09090) does not say how the items found by its interests are merged. This is ComiRec's rule
    (arXiv:2005.09347, ``f(u, i) = max_k s(u_k, i)``): all B K queries are searched at once, each for its
    `per_query` best items, and the lists are merged without repeats. With ``per_query >= k`` and an exact index the
    result is the exact top-k of ``max_k s(u_k, .)``; a shorter list is cheaper and can miss items.

    Args:
        index: where the items are.
        queries: (B, K, D).
        k: length of the merged lists.
        per_query: length of each query's list; None takes k.

    Returns:
        Scores (B, k), best first, and item ids (B, k), each at most once a user; equal scores stand by lower id. A list
        that is shorter than k ends in item 0 with score -inf.

    Raises:
        ValueError: `queries` has another shape or no query, or `per_query` is below 1.
    """
    if queries.ndim != 3 or queries.shape[1] < 1:
        raise ValueError(f"queries of shape {tuple(queries.shape)} must be (users, queries of a user, width)")
    length = k if per_query is None else per_query
    if length < 1:
        raise ValueError(f"per_query={length} must be at least 1")
    num_rows, num_queries, _ = queries.shape
    found = index.search(queries.flatten(0, 1), length)  # (B K, N)
    if num_queries == 1 and length == k:
        return found  # one list needs no merge
    return max_merge(found.scores.reshape(num_rows, -1), found.item_ids.reshape(num_rows, -1), k)


def max_merge(scores: Tensor, item_ids: Tensor, k: int) -> Found:
    """The k best distinct items of each row, an item that stands there several times having its best score.

    Args:
        scores: (B, R) in any order; -inf where there is no item.
        item_ids: (B, R); 0 where there is no item.
        k: length of the result, which ends in item 0 with score -inf where a row has fewer items.

    Returns:
        Scores (B, k), best first, and item ids (B, k); equal scores stand by lower id.
    """
    if scores.shape[1] < k:
        missing = (0, k - scores.shape[1])
        scores = torch.nn.functional.pad(scores, missing, value=-torch.inf)
        item_ids = torch.nn.functional.pad(item_ids, missing)
    distinct, order, nth = distinct_items(item_ids)
    best = torch.full_like(scores, -torch.inf).scatter_reduce_(1, nth, scores.gather(1, order), "amax")
    # Distinct items stand by rising id, so a stable sort leaves the lower id first among equal scores.
    best, order = best.sort(dim=1, descending=True, stable=True)
    return Found(best[:, :k], distinct.gather(1, order[:, :k]))
