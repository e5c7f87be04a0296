"""Soft search: one list of items for a user who has several interest vectors.

SPARC (arXiv:2508.09090) section 3.5 searches with one vector for each of a user's likely interests and does not say how
the lists become one: choice S11.
Axis letters: B rows (users), K interest queries, N places of a query's list, R distinct items of a user, C codes.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_lightning.errors import InputError
from recsys_lightning.retrieval.index import Found, ItemIndex, closed_at
from recsys_lightning.retrieval.recommendations import Recommendations, distinct_items, rank_candidates
from recsys_lightning.retrieval.torch_index import TorchIndex

Merge = Literal["max", "p_weighted", "sum", "mixture", "quota"]


class Cells(NamedTuple):
    """Which items a query may find: those that carry its code."""

    item_codes: Tensor  # (I+1,) int64 code of each item; row 0 is padding and is not read
    codes: Tensor  # (B, K) int64 code of each query


def soft_search(
    index: ItemIndex,
    queries: Tensor,
    log_probs: Tensor,
    k: int,
    merge: Merge = "max",
    per_query: int | None = None,
    score_temperature: float = 1.0,
    restrict_to: Cells | None = None,
) -> Recommendations:
    """The k best items of each user by all of the user's K interest queries, closed under ties.

    All B K queries go into one search, each for its `per_query` best items, and `merge_interests` makes one list of
    them. With one query this is a plain search ("hard search"). Where ``per_query >= k`` and the index is exact,
    ``max`` and ``p_weighted`` are the exact top-k of their formula over the whole catalogue; ``sum`` and ``mixture``
    are once `per_query` is the number of items. Shorter lists are cheaper and can miss items.

    Args:
        index: where the items are.
        queries: (B, K, D); B may be 0.
        log_probs: (B, K) log-probability of each interest, of any total mass; -inf where there is no such query.
        k: places wanted.
        merge: see `merge_interests`.
        per_query: places N of each query's list; None takes k. Of a fixed number, the first places of the result do not
            depend on k; ``sum``, ``mixture`` and ``quota`` look at whole lists, so with None they do.
        score_temperature: see `merge_interests`.
        restrict_to: let each query find items of its own code only; None lets it find all. The cells are then searched
            exactly, one by one, whatever the index would have done.

    Raises:
        InputError: k, per_query or score_temperature is out of range, a query or a log-probability is NaN, no query of
            a user has a probability, or cells of an index that does not hold all items.
        ValueError: tensors whose shapes do not fit.
    """
    if queries.ndim != 3 or queries.shape[1] < 1:
        raise ValueError(f"queries of shape {tuple(queries.shape)} must be (users, queries of a user, width)")
    if per_query is not None and per_query < 1:
        raise InputError(f"per_query={per_query} must be at least 1: places of the list of each interest")
    _check_merge(merge, k, score_temperature)
    length = min(k if per_query is None else per_query, index.num_items)  # N
    if restrict_to is None:
        found = index.search_with_ties(queries.flatten(0, 1), length)  # (B K, N)
        lists = Found(*(part.view(*queries.shape[:2], part.shape[1]) for part in found))  # (B, K, N)
    else:
        lists = search_cells(index, queries, length, restrict_to)
    return merge_interests(lists, log_probs, k, merge, score_temperature, length)


def search_cells(index: ItemIndex, queries: Tensor, k: int, cells: Cells) -> Found:
    """For each query the k best items that carry its code, exactly, and those that tie with the k-th.

    Each code's items are searched with the queries of that code alone, which costs a C-th of a search of all items.

    Args:
        index: of all items; its vectors and similarity are used.
        queries: (B, K, D).
        k: places of each list; where a code has fewer items the list ends early.
        cells: codes of items and queries; a code that no item has gives an empty list.

    Returns:
        Scores and item ids (B, K, N), N >= k.
    """
    table = index.table  # (I+1, D)
    if cells.item_codes.shape != table.shape[:1] or cells.codes.shape != queries.shape[:2]:
        raise ValueError(
            f"cells need item_codes ({len(table)},) and codes {tuple(queries.shape[:2])}, got "
            f"{tuple(cells.item_codes.shape)} and {tuple(cells.codes.shape)}"
        )
    asked, codes = queries.flatten(0, 1), cells.codes.flatten()  # (B K, D), (B K,)
    parts = []
    for code in torch.unique(codes).tolist():
        items = (cells.item_codes[1:] == code).nonzero()[:, 0].to(table.device) + 1  # (n,) ascending, as are the places
        rows = (codes == code).nonzero()[:, 0]
        if len(items):
            found = TorchIndex(table[items], index.similarity).search_with_ties(asked[rows], k)
            own = F.pad(items, (1, 0)).to(found.item_ids.device)[found.item_ids]  # place in the cell -> item, 0 -> 0
            parts.append((rows, Found(found.scores, own)))
    width = max([k, *(found.scores.shape[1] for _, found in parts)])
    scores = asked.new_full((len(asked), width), -torch.inf, dtype=torch.float32)  # (B K, N)
    ids = torch.zeros_like(scores, dtype=torch.int64)
    for rows, found in parts:
        scores[rows, : found.scores.shape[1]] = found.scores
        ids[rows, : found.scores.shape[1]] = found.item_ids
    return Found(*(part.view(*queries.shape[:2], width) for part in (scores, ids)))


def merge_interests(
    lists: Found,
    log_probs: Tensor,
    k: int,
    merge: Merge = "max",
    score_temperature: float = 1.0,
    shared: int | None = None,
) -> Recommendations:
    """One list of k items without repeats from the lists of a user's interests, closed under ties among those found.

    With s_j(z) the score of item z in list j and p_j the interest's probability, an item's score is

    * ``"max"``: ``max_j s_j(z)`` over the lists that hold it, ComiRec's rule (arXiv:2005.09347); p_j is not looked at.
    * ``"p_weighted"``: ``max_j (log p_j + s_j(z) / score_temperature)`` over the lists that hold it.
    * ``"sum"``: ``sum_j p_j s_j(z)`` over all lists. An item that a list does not hold counts there as its last item,
      than which it cannot score more: to count it as zero would reward it where scores are negative. A list whose
      p_j is zero in floating point is left out.
    * ``"mixture"``: ``log sum_j p_j softmax(s_j / score_temperature)(z)``, the softmax over the items of list j: the
      chance that z is drawn when first an interest and then an item of its list is. It sets the lists of different
      interests on one scale, which their scores alone are not.
    * ``"quota"``: minus the number of items ahead of it, see `quota_merge`.

    Args:
        lists: scores and item ids (B, K, N), each list as an index gives it: best first, each item once, -inf and 0
            behind its end.
        log_probs: (B, K); a list with -inf is left out. Only ``quota`` makes them sum to one.
        k: places wanted.
        merge: the rule.
        score_temperature: for ``p_weighted`` and ``mixture``: the smaller, the less the probabilities count.
        shared: for ``quota``, the places that are shared out; None is k.

    Raises:
        InputError: an argument is out of range, a log-probability is NaN or +inf, or a user has none above -inf.
    """
    _check_merge(merge, k, score_temperature)
    log_probs = _checked(log_probs, lists.scores)
    if merge == "max" and lists.scores.shape[1] == 1:  # a plain search needs no merge
        scores, ids = closed_at(Found(lists.scores[:, 0], lists.item_ids[:, 0]), k)
        return Recommendations(ids, scores)
    absent = (log_probs == -torch.inf)[..., None]  # (B, K, 1)
    scores, item_ids = lists.scores.masked_fill(absent, -torch.inf), lists.item_ids.masked_fill(absent, 0)
    if merge == "max":
        return max_merge(scores, item_ids, k)
    if merge == "p_weighted":
        return max_merge(log_probs[..., None] + scores / score_temperature, item_ids, k)
    if merge == "mixture":
        return mixture_merge(scores / score_temperature, item_ids, log_probs, k)
    if merge == "sum":
        return sum_merge(scores, item_ids, log_probs, k)
    return quota_merge(scores, item_ids, log_probs, k, shared)


def max_merge(scores: Tensor, item_ids: Tensor, k: int) -> Recommendations:
    """The k items of the best score over a user's lists: scores and item ids (B, K, N)."""
    distinct, column = _columns(item_ids)
    best = torch.full_like(distinct, -torch.inf, dtype=scores.dtype)  # (B, R)
    best.scatter_reduce_(1, column.flatten(1), scores.flatten(1), "amax")
    return _ranked(distinct, best, k)


def sum_merge(scores: Tensor, item_ids: Tensor, log_probs: Tensor, k: int) -> Recommendations:
    """The k items of the largest ``sum_j p_j s_j``: scores and item ids (B, K, N), log_probs (B, K)."""
    weights = log_probs.exp().to(scores.dtype)  # (B, K)
    # What only a list without weight holds would equal the last of those that have some, and is as good as not found.
    absent = (weights == 0)[..., None]  # (B, K, 1)
    scores, item_ids = scores.masked_fill(absent, -torch.inf), item_ids.masked_fill(absent, 0)
    distinct, column = _columns(item_ids)
    held = scores > -torch.inf  # (B, K, N)
    last = scores.masked_fill(~held, torch.inf).amin(-1)  # (B, K)
    last = last.masked_fill(~held.any(-1), 0.0)  # an empty list says nothing of anybody
    total = torch.zeros_like(distinct, dtype=scores.dtype)  # (B, R)
    for j, weight in enumerate(weights.unbind(1)):  # in one order, so that equals stay equal
        score = last[:, j, None].expand_as(total).scatter(1, column[:, j], scores[:, j])  # (B, R)
        total = total + weight[:, None] * score
    return _ranked(distinct, total, k)


def mixture_merge(scores: Tensor, item_ids: Tensor, log_probs: Tensor, k: int) -> Recommendations:
    """The k items of the largest ``log sum_j p_j softmax(s_j)``: a list does not draw what it lacks."""
    distinct, column = _columns(item_ids)
    listed = scores.amax(-1, keepdim=True) > -torch.inf  # (B, K, 1) an empty list draws nothing
    drawn = scores.masked_fill(~listed, 0.0).log_softmax(-1).masked_fill(~listed, -torch.inf)
    drawn = drawn + log_probs[..., None]  # (B, K, N)
    nothing = torch.full_like(distinct, -torch.inf, dtype=scores.dtype)  # (B, R)
    total = nothing
    for j in range(scores.shape[1]):  # in one order, so that equals stay equal
        total = torch.logaddexp(total, nothing.scatter(1, column[:, j], drawn[:, j]))
    return _ranked(distinct, total, k)


def quota_merge(
    scores: Tensor, item_ids: Tensor, log_probs: Tensor, k: int, shared: int | None = None
) -> Recommendations:
    """Lists (B, K, N) share places in proportion to the probabilities ``exp(log_probs)`` (B, K): `shared`, or else k.

    List j gets the part p_j / sum p of them, rounded by largest remainder; of equal remainders the likelier
    interest's, then the first's, is rounded up. Places are given in turns, so that also the first few are shared by
    probability: the next turn is that of the list with the smallest (places taken + 1/2) / (its places), of equals the
    likelier one's. In its turn a list takes its best item that is not taken yet; items that score alike there are taken
    together and share the place. A list that runs out gives up its turns; places that are left go to the items with
    the best score in any list.

    Returns:
        Items in the order in which they were taken; a score is minus the number of items that are ahead.
    """
    order = log_probs.argsort(dim=1, descending=True, stable=True)  # (B, K) likelier first
    scores, item_ids = (part.gather(1, order[..., None].expand_as(part)) for part in (scores, item_ids))
    shared = k if shared is None else shared
    places = apportion(log_probs.double().softmax(1).gather(1, order), shared)  # (B, K)
    distinct, column = _columns(item_ids)
    ahead = torch.full_like(distinct, -1)  # (B, R) items before it; -1 is not taken
    ahead = ahead.masked_fill(distinct == 0, 0)  # padding is never there to take
    filled = torch.zeros_like(places)  # (B, K) places taken
    count = torch.zeros_like(places[:, :1])  # (B, 1) items taken
    for _ in range(k):  # each turn uses up a place, be it for nothing
        due = ((filled + 0.5) / places).masked_fill(filled >= places, torch.inf)  # (B, K)
        turn = due.argmin(1, keepdim=True)  # (B, 1)
        over = due.gather(1, turn) == torch.inf  # (B, 1) all places are used up
        mine = turn[..., None].expand(-1, 1, scores.shape[2])
        score, place = scores.gather(1, mine)[:, 0], column.gather(1, mine)[:, 0]  # (B, N)
        score = score.masked_fill((ahead.gather(1, place) >= 0) | over, -torch.inf)
        best = score.amax(1, keepdim=True)  # (B, 1)
        taken = (score == best) & (best > -torch.inf)  # (B, N)
        ahead.scatter_reduce_(1, place, torch.where(taken, count, -1), "amax")
        number = taken.sum(1, keepdim=True)  # (B, 1)
        count = count + number
        filled.scatter_add_(1, turn, number.clamp(min=1))
    rest = torch.full_like(distinct, -torch.inf, dtype=scores.dtype)  # (B, R)
    rest.scatter_reduce_(1, column.flatten(1), scores.flatten(1), "amax").masked_fill_(ahead >= 0, -torch.inf)
    ahead = torch.where(ahead < 0, count + _number_better(rest), ahead)
    return _ranked(distinct, (-ahead).to(scores.dtype), k)


def apportion(shares: Tensor, places: int) -> Tensor:
    """Whole numbers (B, K) that sum to `places`, in proportion to shares (B, K) that sum to 1, by largest remainder.

    Of equal remainders the first is rounded up.
    """
    exact = shares * places  # (B, K)
    whole = exact.floor().long()
    left = places - whole.sum(1, keepdim=True)  # (B, 1)
    # Rounded, so that remainders count as equal where the rounding of float32 probabilities alone tells them apart.
    nth = (exact - whole).mul(1e4).round().argsort(dim=1, descending=True, stable=True).argsort(1)  # (B, K)
    return whole + (nth < left)


def _check_merge(merge: str, k: int, score_temperature: float) -> None:
    if merge not in get_args(Merge):
        raise InputError(f"merge={merge!r} must be one of {', '.join(get_args(Merge))}")
    if k < 1:
        raise InputError(f"k={k}: a list must have at least one place")
    if not score_temperature > 0:
        raise InputError(f"score_temperature={score_temperature} must be above 0")


def _checked(log_probs: Tensor, scores: Tensor) -> Tensor:
    """Log-probabilities (B, K) that fit lists of these scores (B, K, N), in the scores' type."""
    if log_probs.shape != scores.shape[:2]:
        raise ValueError(f"log_probs must be {tuple(scores.shape[:2])} as the queries, got {tuple(log_probs.shape)}")
    broken = log_probs.isnan() | (log_probs == torch.inf)  # (B, K)
    bad = broken.any(1) | (log_probs == -torch.inf).all(1)  # (B,)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise InputError(
            f"the interests of user {row} (counted from 0) have log-probabilities {log_probs[row].tolist()}: each must "
            "be a number or -inf, and one at least a number; look for where the training diverged"
        )
    return log_probs.detach().to(scores.dtype)


def _columns(item_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct items (B, R) of lists (B, K, N), 0 for none, and which of them stands at each place (B, K, N)."""
    distinct, order, nth = distinct_items(item_ids.flatten(1))
    column = torch.empty_like(nth).scatter_(1, order, nth)
    return distinct, column.view_as(item_ids)


def _ranked(distinct: Tensor, scores: Tensor, k: int) -> Recommendations:
    """The k best of distinct items (B, R) with their scores, closed under ties, in lists of k places or more."""
    scores = scores.masked_fill(distinct == 0, -torch.inf)
    missing = (0, max(0, k - scores.shape[1]))
    return rank_candidates(F.pad(distinct, missing), F.pad(scores, missing, value=-torch.inf), k)


def _number_better(scores: Tensor) -> Tensor:
    """How many of a row's scores (B, R) are above each of them."""
    best, order = scores.sort(dim=1, descending=True)
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(order)  # (B, R)
    first = torch.ones_like(best, dtype=torch.bool)
    first[:, 1:] = best[:, 1:] != best[:, :-1]
    return torch.empty_like(order).scatter_(1, order, place.masked_fill(~first, 0).cummax(1).values)
