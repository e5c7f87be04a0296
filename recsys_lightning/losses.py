"""Losses as pure functions: tensors in, one scalar out. No state, no logging, no hidden weights.

Axis letters: B rows, D width, U candidates, N negatives, J shuffled interests.
"""

import math
from typing import Literal

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
    similarity: Literal["cosine", "inner_product"] = "cosine",
) -> Tensor:
    """Contrast each query with its own candidate against all the others.

    COBRA (arXiv:2503.02453) eq. 8, with a temperature t (C4) and a mean over rows in place of a sum:
    ``-mean_b log( exp(cos(q_b, c_y) / t - log q_y) / sum_u exp(cos(q_b, c_u) / t - log q_u) )``, ``y = target[b]``.
    SPARC (arXiv:2508.09090) section 3.4 has it twice, with inner products in place of cosines: L_CL_ui is that of users
    with the quantized vectors of the items, L_CL_ii that of item vectors with the same (S5).

    Args:
        query: (B, D).
        candidates: (U, D), each item once, so that no other row of the same item counts as a negative.
        target: (B,) index of each query's own candidate.
        temperature: t > 0.
        excluded: (B, U) bool, True where a candidate is no negative of a row; the own candidate always stays.
        log_q: (U,) log of the chance that an item is among the candidates, for the logQ correction (C7).
        similarity: of queries and candidates.

    Returns:
        Scalar; 0 rows give 0.
    """
    # The temperature goes into the narrow factor: a pass over (B, U) scores would cost as much as the product itself.
    if similarity == "cosine":
        query, candidates = F.normalize(query, dim=-1), F.normalize(candidates, dim=-1)
    scores = (query / temperature) @ candidates.T  # (B, U)
    if log_q is not None:
        scores = scores - log_q
    if excluded is not None:
        own = F.one_hot(target, len(candidates)).bool()  # (B, U)
        scores = scores.masked_fill(excluded & ~own, -torch.inf)
    return cross_entropy(scores, target)


def log_sampling_chance(
    log_popularity: Tensor, num_met: Tensor | int, num_drawn: Tensor | int, num_items: int
) -> Tensor:
    """Log of the chance that an item is among the candidates of a batch, for the logQ correction (C7, S6).

    Of an item with popularity p, met among n items of users and m drawn uniformly from I items:
    ``log(1 - (1 - p)^n (1 - 1/I)^m)``.

    Args:
        log_popularity: (U,) log of the share of all training interactions.
        num_met: n.
        num_drawn: m.
        num_items: I.
    """
    stays_out = torch.log1p(-log_popularity.exp()) * num_met + math.log1p(-1 / num_items) * num_drawn
    return (-torch.expm1(stays_out)).log()  # (U,)


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over rows: ``-mean_b log softmax(logits_b)[target_b]``; 0 rows give 0, not NaN.

    COBRA eq. 7 for one code level; L_interest of SPARC (arXiv:2508.09090, section 3.4).

    Args:
        logits: (B, K).
        target: (B,).
        label_smoothing: share e of a label that all K classes get alike:
            ``-mean_b ((1 - e) log p[target_b] + e mean_k log p[k])`` (S10).
    """
    total = F.cross_entropy(logits.float(), target, reduction="sum", label_smoothing=label_smoothing)
    return total / max(len(target), 1)


def binary_cross_entropy(right: Tensor, wrong: Tensor) -> Tensor:
    """L_BCE of SPARC (arXiv:2508.09090, section 3.4): every (user, item, label) row by itself.

    ``-mean( y log sigmoid(s) + (1 - y) log(1 - sigmoid(s)) )`` over the B right and B N wrong items, 0 without any.

    Args:
        right: (B, 1) scores of the items with label 1.
        wrong: (B, N) scores of those with label 0.
    """
    total = F.softplus(-right.float()).sum() + F.softplus(wrong.float()).sum()
    return total / max(right.numel() + wrong.numel(), 1)


def bayesian_personalized_ranking(better: Tensor, worse: Tensor, valid: Tensor | None = None) -> Tensor:
    """``-mean_b mean_j log sigmoid(better_b - worse_bj)`` (Rendle et al. 2009, arXiv:1205.2618).

    L_BPR_shuffle of SPARC (arXiv:2508.09090, section 3.4): of one item, the score by a user who is asked with the
    item's own code, and the scores by the same user asked with codes of other items (S9).

    Args:
        better: (B,) scores.
        worse: (B, J) scores.
        valid: (B,) bool, rows that count; the mean is over these, and without any it is 0.
    """
    terms = F.softplus(worse.float() - better.float()[:, None]).mean(1)  # (B,)
    if valid is None:
        return terms.sum() / max(len(terms), 1)
    return terms.masked_fill(~valid, 0.0).sum() / valid.sum().clamp_min(1)


def mixture_cross_entropy(scores: Tensor, log_weights: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of a mixture of softmaxes: ``-mean_b log sum_k w_bk softmax(scores_bk)[target_b]``; 0 rows give 0.

    Args:
        scores: (B, K, U).
        log_weights: (B, K) of the parts, up to a constant: w is their softmax over K.
        target: (B,).
    """
    places = target[:, None, None].expand(-1, scores.shape[1], 1)  # (B, K, 1)
    parts = scores.float().log_softmax(-1).gather(2, places)[..., 0]  # (B, K)
    return -(parts + log_weights.float().log_softmax(-1)).logsumexp(1).sum() / max(len(target), 1)
