"""Gradient estimators of quantization against hand-written Jacobians."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from recsys_lightning.nn.estimators import Estimator, estimate, gumbel_words

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


def test_gumbel_words_are_codewords_weighed_by_the_softmax_of_noise_less_distances():
    """The printed formula with the noise drawn again: its value, and its gradients to rows and codewords."""
    rows, codebook = pair(num_rows=5)[0], torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    torch.manual_seed(1)
    noise = -torch.empty(5, 3, dtype=torch.float64).exponential_().log()
    torch.manual_seed(1)
    got = gumbel_words(rows, codebook, 0.7)
    distances = (rows[:, None] - codebook).square().sum(-1)  # (B, K)
    scale = sum(row.min() for row in distances.detach()) / 5
    words = torch.zeros_like(rows)
    for b in range(5):
        weights = torch.exp(-distances[b] / (scale * 0.7) + noise[b])
        words[b] = (weights / weights.sum()) @ codebook
    torch.testing.assert_close(got, words)
    passed = torch.randn_like(rows)
    for ours, by_hand in zip(
        torch.autograd.grad(got, (rows, codebook), passed),
        torch.autograd.grad(words, (rows, codebook), passed),
        strict=True,
    ):
        torch.testing.assert_close(ours, by_hand)


def test_the_largest_weight_is_of_a_code_drawn_by_the_softmax_of_negative_distances():
    """The words of unit vectors are the weights themselves."""
    torch.manual_seed(0)
    row = torch.tensor([0.6, 0.3, 0.0])
    weights = gumbel_words(row.expand(20_000, 3), torch.eye(3), 2.0)  # (B, K)
    distances = (row - torch.eye(3)).square().sum(-1)
    expected = torch.softmax(-distances / (2.0 * distances.min()), 0)
    torch.testing.assert_close(torch.bincount(weights.argmax(-1)) / 20_000, expected, atol=0.015, rtol=0)


def test_gumbel_words_of_a_low_temperature_are_the_nearest_codewords():
    torch.manual_seed(0)
    rows, codebook = torch.randn(100, 4), torch.randn(3, 4)
    nearest = codebook[torch.cdist(rows, codebook).argmin(-1)]
    torch.testing.assert_close(gumbel_words(rows, codebook, 1e-5), nearest)
    assert (gumbel_words(rows, codebook, 1.0) - nearest).norm(dim=-1).min() > 1e-3


def test_gumbel_words_follow_the_scale_of_their_space():
    """An encoder's first outputs differ by little: noise of unit size must not drown that."""
    rows, codebook = (tensor.detach() for tensor in pair(num_rows=6))
    torch.manual_seed(0)
    wide = gumbel_words(rows, codebook[:3], 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(gumbel_words(rows * 1e-3, codebook[:3] * 1e-3, 0.5), wide * 1e-3)


def test_gumbel_words_are_finite_where_rows_are_codewords():
    codebook = torch.randn(3, 4).requires_grad_()
    rows = codebook.detach().clone().requires_grad_()
    words = gumbel_words(rows, codebook, 0.2)
    gradients = torch.autograd.grad(words.sum(), (rows, codebook))
    assert torch.isfinite(words).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
