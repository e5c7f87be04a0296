"""Sinkhorn-balanced assignment: rows shared out among codes so that every code gets about as many.

LETTER (arXiv:2405.07314) and the public code of MiniOneRec assign the last level of an RQ-VAE so.
Shapes: B rows, K codes.
"""

import torch
from torch import Tensor

from recsys_lightning.errors import InputError

# Centred costs span 2: at this epsilon their exponentials, and the scalings of them, still fit into float64.
SMALLEST_EPSILON = 0.003


def check_sinkhorn(epsilon: float, iterations: int) -> None:
    """Refuse what a Sinkhorn assignment cannot be computed with.

    Raises:
        InputError: `epsilon` below `SMALLEST_EPSILON`, or no iteration.
    """
    if not SMALLEST_EPSILON <= epsilon < float("inf"):
        raise InputError(
            f"the epsilon of a Sinkhorn assignment must be finite and {SMALLEST_EPSILON} or more, got {epsilon}; "
            "exponentials of less do not fit into float64"
        )
    if iterations < 1:
        raise InputError(f"a Sinkhorn assignment needs 1 iteration or more, got {iterations}")


@torch.no_grad()
def sinkhorn_plan(distances: Tensor, epsilon: float = 0.003, iterations: int = 100) -> Tensor:
    """The soft assignment of rows to codes whose columns have, in the limit, equal sums.

    Entropy-regularised optimal transport (Cuturi, arXiv:1306.0895) between B rows and K codes of equal weight, on
    distances that are centred first, as LETTER and MiniOneRec do::

        c = (d - middle) / amplitude, in -1..1 over the whole matrix
        P = diag(u) exp(-c / epsilon) diag(v),   each row of P sums to 1,   each column to B / K in the limit

    The closer epsilon is to zero, the closer P is to a hard assignment of least total distance.

    Args:
        distances: (B, K) squared distances.
        epsilon: Weight of the entropy, relative to the centred distances; 0.003 or more.
        iterations: Pairs of scalings; few rows and a small epsilon need the most. Rows are scaled once more at the end.

    Returns:
        (B, K) float64.

    Raises:
        InputError: `epsilon` or `iterations` is out of its range.
    """
    check_sinkhorn(epsilon, iterations)
    costs = distances.double()  # (B, K)
    smallest = costs.min()  # ()
    amplitude = ((costs.max() - smallest) / 2).clamp(min=torch.finfo(costs.dtype).tiny)  # () zero: all are equal
    kernel = (-(costs - smallest) / amplitude / epsilon).exp()  # (B, K) the largest is 1, which keeps the scalings low
    columns = kernel.new_ones(distances.shape[1])  # (K,)
    for _ in range(iterations):
        rows = (kernel @ columns).reciprocal()  # (B,)
        columns = (rows @ kernel).reciprocal()  # (K,)
        columns = columns / columns.max()  # one factor for all codes is of no effect, and would overflow
    plan = kernel * columns  # (B, K)
    return plan / plan.sum(-1, keepdim=True)


def balanced_codes(distances: Tensor, epsilon: float = 0.003, iterations: int = 100) -> Tensor:
    """Code (B,) int64 of each row by the largest entry of its `sinkhorn_plan`: distances (B, K).

    Equal rows get equal codes; codes are only about as often used as each other.
    """
    return sinkhorn_plan(distances, epsilon, iterations).argmax(-1)
