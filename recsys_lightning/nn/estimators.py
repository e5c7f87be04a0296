"""Gradient estimators of quantization: what a choice that has no derivative passes back, and to whom.

SPARC (arXiv:2508.09090) says that the recommendation losses update the codebooks and names no estimator: choice S2.
Shapes: B rows, D width, K codes.
"""

from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

Estimator = Literal["straight_through", "gather", "gather_straight_through", "rotation"]


def estimate(x: Tensor, quantized: Tensor, estimator: Estimator) -> Tensor:
    """The quantized rows, with a gradient to the input, to the codewords or to both.

    With x the input, q the codewords' sum that stands for it and sg the stop-gradient:

    * ``"straight_through"``: ``x + sg(q - x)``. x gets the gradient as it is, codewords get none (van den Oord et al.,
      arXiv:1711.00937, 3.2).
    * ``"gather"``: ``q``. Codewords get the gradient as it is, x gets none.
    * ``"gather_straight_through"``: ``q + x - sg(x)``. Both get it as it is.
    * ``"rotation"``: the rotation trick (Fifty et al., arXiv:2410.06424, section 4), ``sg(s R) x + q - sg(q)``, where R
      is the rotation that turns x into the direction of q within their plane and s = |q| / |x|. Codewords get the
      gradient g as it is, x gets s R^T g: it keeps the angle that g makes with q. Where q is opposite to x every
      plane that holds x would do: R is a half turn in one of them, and with D = 1 the change of sign. Where q is zero,
      s is zero and x gets nothing; where x is zero there is no direction to turn, and x gets g as it is.

    Args:
        x: (B, D) input.
        quantized: (B, D) its quantization q, with a gradient to the codewords or without.
        estimator: who gets which gradient.

    Returns:
        (B, D) with the value of q whatever the estimator, for ``"straight_through"`` up to rounding.
    """
    if estimator == "straight_through":
        return x + (quantized - x).detach()  # (B, D)
    if estimator == "gather":
        return quantized
    if estimator == "gather_straight_through":
        return quantized + (x - x.detach())  # (B, D)
    if estimator == "rotation":
        turned = _rotated(x, quantized.detach())  # (B, D)
        return quantized + (turned - turned.detach())  # (B, D)
    assert_never(estimator)


def gumbel_words(rows: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """Random soft codewords: rows (B, D) and codebook (K, D), each with a gradient, -> (B, D).

    The Gumbel-softmax (Jang et al., arXiv:1611.01144, equation 2, its own temperature 1) over negative distances, here
    in units of s, the batch's mean squared distance to the nearest codeword::

        w_k = softmax_k(-|row - e_k|^2 / (temperature * s) + g_k),   g_k standard Gumbel noise,   word = sum_k w_k e_k

    The largest weight is that of a code drawn by softmax(-distance / (temperature * s)). The lower the temperature, the
    surer it is the nearest, and the nearer a word is to it. s is held. Public RQ-VAEs have no s: noise of size 1 then
    drowns the distances of an encoder's first outputs, which differ by far less than 1, and all latents become one.
    """
    distances = squared_distances(rows, codebook)  # (B, K)
    scale = distances.detach().amin(-1).mean().clamp(min=torch.finfo(rows.dtype).tiny)  # ()
    return F.gumbel_softmax(-distances / (temperature * scale)) @ codebook


def squared_distances(rows: Tensor, codebook: Tensor) -> Tensor:
    """Squared Euclidean distances (B, K) of rows (B, D) to the codewords (K, D), with a gradient to both."""
    return torch.cdist(rows, codebook, compute_mode="donot_use_mm_for_euclid_dist").square()


def _rotated(x: Tensor, target: Tensor) -> Tensor:
    """``sg(s R) x`` (B, D) for x (B, D) and target (B, D): has the target's value and passes ``s R^T`` to x."""
    held = x.detach()
    shortest = torch.finfo(x.dtype).tiny ** 0.5  # the square of less is zero, and so would be a length
    length = held.norm(dim=-1, keepdim=True)  # (B, 1)
    zero = length <= shortest
    start = torch.where(zero, 0.0, held / length.masked_fill(zero, 1.0))  # (B, D) unit, or zero
    end = F.normalize(target, dim=-1, eps=shortest)  # (B, D) unit, or zero
    # R = I - 2 m m^T + 2 end start^T for the unit vector m half way, the paper's equation 4: nothing of size (D, D).
    middle = start + end  # (B, D)
    opposite = middle.norm(dim=-1, keepdim=True) < torch.finfo(x.dtype).eps ** 0.5  # half way is rounding alone
    middle = F.normalize(torch.where(opposite, _perpendicular(start), middle), dim=-1, eps=shortest)
    along_middle = (x * middle).sum(-1, keepdim=True)  # (B, 1)
    along_start = (x * start).sum(-1, keepdim=True)  # (B, 1)
    turned = x - 2 * along_middle * middle + 2 * along_start * end  # (B, D)
    scale = target.norm(dim=-1, keepdim=True) / length.masked_fill(zero, 1.0)  # (B, 1)
    return torch.where(zero, x, scale * turned)


def _perpendicular(directions: Tensor) -> Tensor:
    """A vector (B, D) at a right angle to each unit vector (B, D): zero where D is 1 and there is none."""
    axis = F.one_hot(directions.abs().argmin(-1), directions.shape[-1]).to(directions)  # (B, D) the least aligned
    return axis - (axis * directions).sum(-1, keepdim=True) * directions
