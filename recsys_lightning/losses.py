"""Losses as pure functions: tensors in, one scalar out. No state, no logging, no hidden weights.

Axis letters: B rows, D width, U candidates.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    query: Tensor,
    candidates: Tensor,
    target: Tensor,
    temperature: float,
    excluded: Tensor | None = None,
    log_q: Tensor | None = None,
) -> Tensor:
    """Contrast each query with its own candidate against all the others, by cosine.

    COBRA (arXiv:2503.02453) eq. 8, with a temperature t (C4) and a mean over rows in place of a sum:
    ``-mean_b log( exp(cos(q_b, c_y) / t - log q_y) / sum_u exp(cos(q_b, c_u) / t - log q_u) )``, ``y = target[b]``.

    Args:
        query: (B, D).
        candidates: (U, D), each item once, so that no other row of the same item counts as a negative.
        target: (B,) index of each query's own candidate.
        temperature: t > 0.
        excluded: (B, U) bool, True where a candidate is no negative of a row; the own candidate always stays.
        log_q: (U,) log of the chance that an item is among the candidates, for the logQ correction (C7).

    Returns:
        Scalar; 0 rows give 0.
    """
    # The temperature goes into the narrow factor: a pass over (B, U) scores would cost as much as the product itself.
    scores = (F.normalize(query, dim=-1) / temperature) @ F.normalize(candidates, dim=-1).T  # (B, U)
    if log_q is not None:
        scores = scores - log_q
    if excluded is not None:
        own = F.one_hot(target, len(candidates)).bool()  # (B, U)
        scores = scores.masked_fill(excluded & ~own, -torch.inf)
    return cross_entropy(scores, target)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over rows: ``-mean_b log softmax(logits_b)[target_b]``; 0 rows give 0, not NaN.

    COBRA eq. 7 for one code level: logits (B, K), target (B,).
    """
    return F.cross_entropy(logits.float(), target, reduction="sum") / max(len(target), 1)
