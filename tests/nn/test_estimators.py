"""Gradient estimators of quantization against hand-written Jacobians."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from recsys_lightning.nn.estimators import Estimator, estimate

ALL = get_args(Estimator)


def pair(seed: int = 0, num_rows: int = 5, dim: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, quantized = torch.randn(2, num_rows, dim, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), quantized.requires_grad_()


def gradients(x: Tensor, quantized: Tensor, estimator: Estimator, passed: Tensor) -> tuple[Tensor, Tensor]:
    """What x and the codewords get when the estimate's gradient is `passed`; zeros for what is not reached."""
    out = estimate(x, quantized, estimator)
    got = torch.autograd.grad(out, (x, quantized), passed, allow_unused=True, materialize_grads=True)
    return got[0], got[1]


def rotation_by_hand(start: Tensor, end: Tensor) -> Tensor:
    """The dense matrix (D, D) that turns unit vector `start` to `end` in their plane, by angle, sine and cosine."""
    cosine = start @ end
    side = end - cosine * start
    sine = side.norm()
    side = side / sine
    plane = torch.outer(start, start) + torch.outer(side, side)
    turn = torch.outer(side, start) - torch.outer(start, side)
    return torch.eye(len(start), dtype=start.dtype) + (cosine - 1) * plane + sine * turn


@pytest.mark.parametrize("estimator", ALL)
def test_the_value_is_the_quantized_row_whatever_the_estimator(estimator):
    x, quantized = pair()
    torch.testing.assert_close(estimate(x, quantized, estimator), quantized)
    if estimator != "straight_through":
        assert torch.equal(estimate(x.float(), quantized.float(), estimator), quantized.float())


@pytest.mark.parametrize(
    ("estimator", "to_x", "to_codewords"),
    [("straight_through", 1, 0), ("gather", 0, 1), ("gather_straight_through", 1, 1)],
)
def test_the_gradient_goes_as_it_is_to_whom_the_estimator_names(estimator, to_x, to_codewords):
    x, quantized = pair()
    passed = torch.randn_like(x)
    got_x, got_codewords = gradients(x, quantized, estimator, passed)
    assert torch.equal(got_x, to_x * passed)
    assert torch.equal(got_codewords, to_codewords * passed)


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_rotation_passes_the_gradient_back_through_the_dense_rotation_and_rescaling(dim):
    x, quantized = pair(dim=dim)
    passed = torch.randn_like(x)
    got_x, got_codewords = gradients(x, quantized, "rotation", passed)
    assert torch.equal(got_codewords, passed)
    for row, target, gradient, got in zip(x.detach(), quantized.detach(), passed, got_x, strict=True):
        scaled = target.norm() / row.norm() * rotation_by_hand(row / row.norm(), target / target.norm())
        torch.testing.assert_close(scaled @ row, target)  # the matrix by hand is the one of the paper
        torch.testing.assert_close(got, scaled.T @ gradient)


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_nan_where_input_or_codeword_is_zero_tiny_parallel_or_opposite(estimator, dtype):
    one = torch.tensor([3.0, -4.0, 0.0], dtype=dtype)
    zero, other, tiny = torch.zeros(3, dtype=dtype), torch.tensor([1.0, 2.0, 2.0], dtype=dtype), torch.finfo(dtype).tiny
    rows = torch.stack([zero, one, zero, one, one, one, tiny * one, one]).requires_grad_()
    targets = torch.stack([other, zero, zero, one, -2 * one, -one * (1 + 1e-7), other, tiny * one]).requires_grad_()
    passed = torch.ones_like(rows)
    out = estimate(rows, targets, estimator)
    torch.testing.assert_close(out, targets, rtol=1e-6, atol=1e-6)
    assert all(torch.isfinite(got).all() for got in gradients(rows, targets, estimator, passed))


def test_rotation_leaves_the_gradient_alone_at_zero_input_and_stops_it_at_zero_codewords():
    rows = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[3.0, 1.0], [0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    passed = torch.tensor([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]])
    got, _ = gradients(rows, targets, "rotation", passed)
    assert got.tolist() == [[1.0, 5.0], [0.0, 0.0], [3.0, 7.0]]


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_to_the_opposite_direction_rotation_is_a_half_turn(dim):
    """Of determinant 1, orthogonal, and x lands on its opposite: a reflection would have determinant -1."""
    x = torch.randn(1, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim)).requires_grad_()
    target = -3 * x.detach()
    scaled = torch.cat(
        [gradients(x, target.requires_grad_(), "rotation", row[None])[0] for row in torch.eye(dim, dtype=torch.float64)]
    )  # row i is what output i passes back: the Jacobian itself
    torch.testing.assert_close(scaled @ x.detach()[0], target.detach()[0])
    torch.testing.assert_close(scaled @ scaled.T, 9 * torch.eye(dim, dtype=torch.float64))
    assert float(torch.linalg.det(scaled / 3)) == pytest.approx(1.0)


def test_in_one_dimension_rotation_is_the_scale_with_its_sign():
    x, target = torch.tensor([[2.0], [2.0]], requires_grad=True), torch.tensor([[6.0], [-6.0]], requires_grad=True)
    assert gradients(x, target, "rotation", torch.ones_like(x))[0].tolist() == [[3.0], [-3.0]]
