"""Late fusion: several rankings become one, by the places of the items alone.

Axis letters: B rows, R places of all lists together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from recsys_lightning.retrieval.recommendations import Recommendations, distinct_items, rank_candidates


def reciprocal_rank_fusion(lists: Sequence[Recommendations], k: int, constant: float = 60.0) -> Recommendations:
    """Rank items by the sum over lists of ``1 / (constant + rank)`` (Cormack, Clarke and Buettcher, SIGIR 2009).

    Items that score alike in a list share the best of their ranks there; a list says nothing of items it lacks.

    Args:
        lists: of the same B rows; `generated` of the first that has it is kept.
        k: places wanted; the result is closed under ties.
        constant: the larger, the less the first places stand out; 60 is the authors' choice.
    """
    ids = torch.cat([part.item_ids for part in lists], 1)  # (B, R)
    votes = torch.cat([1 / (constant + _ranks(part.scores)) for part in lists], 1)  # (B, R)
    distinct, order, nth = distinct_items(ids)
    total = torch.zeros_like(votes).scatter_add_(1, nth, votes.gather(1, order))
    merged = rank_candidates(distinct, total.masked_fill(distinct == 0, -torch.inf), k)
    return merged._replace(generated=next((part.generated for part in lists if part.generated is not None), None))


def _ranks(scores: Tensor) -> Tensor:
    """(B, R) the best rank, from 1, of the items with each score, of scores that fall along a row."""
    place = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype).expand_as(scores)
    fresh = torch.ones_like(scores, dtype=torch.bool)
    fresh[:, 1:] = scores[:, 1:] != scores[:, :-1]
    return place.masked_fill(~fresh, 0).cummax(1).values
