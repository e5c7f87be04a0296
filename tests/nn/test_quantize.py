"""The residual quantizer against hand-written loops."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from recsys_lightning.errors import InputError
from recsys_lightning.nn.codebook import kmeans_codebook, nearest_code
from recsys_lightning.nn.estimators import gumbel_words
from recsys_lightning.nn.mlp import MLP
from recsys_lightning.nn.quantize import ResidualQuantizer
from recsys_lightning.nn.sinkhorn import balanced_codes


def random_rows(num_rows=32, dim=6, seed=0):
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))


def quantize_by_hand(row, codebooks):
    """One row, one codeword at a time: the codes and the residual in front of each level."""
    residual, codes, residuals = row.clone(), [], []
    for codebook in codebooks:
        distances = [float(((residual - word) ** 2).sum()) for word in codebook]
        codes.append(distances.index(min(distances)))
        residuals.append(residual)
        residual = residual - codebook[codes[-1]]
    return codes, residuals


@pytest.mark.parametrize(("num_levels", "num_codes"), [(1, 4), (3, 8), (4, 2)])
def test_codes_and_vectors_are_those_of_a_hand_loop(num_levels, num_codes):
    torch.manual_seed(0)
    quantizer, x = ResidualQuantizer(6, num_levels, num_codes).eval(), random_rows()
    quantized = quantizer(x)
    for row, codes, vector in zip(x, quantized.codes, quantized.vectors, strict=True):
        by_hand, _ = quantize_by_hand(row, quantizer.codebooks)
        assert codes.tolist() == by_hand
        total = sum(quantizer.codebooks[level, code] for level, code in enumerate(by_hand))
        torch.testing.assert_close(vector, total)
    assert torch.equal(quantizer.encode(x), quantized.codes)
    torch.testing.assert_close(quantizer.decode(quantized.codes), quantized.vectors)


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
def test_the_loss_is_the_printed_formula(codebook_update):
    torch.manual_seed(0)
    quantizer, x = ResidualQuantizer(6, 3, 8, commitment=0.3, codebook_update=codebook_update).eval(), random_rows()
    weight = 0.3 + (codebook_update == "gradient")
    expected = 0.0
    for row in x:
        codes, residuals = quantize_by_hand(row, quantizer.codebooks.detach())
        for level in range(3):
            word = quantizer.codebooks[level, codes[level]].detach()
            expected += weight * float(((residuals[level] - word) ** 2).sum())
    assert float(quantizer(x).loss.detach()) == pytest.approx(expected / len(x), rel=1e-5)


def test_the_gradient_of_the_vectors_passes_straight_through_to_the_input():
    quantizer, x = ResidualQuantizer(6, 3, 8, codebook_update="gradient").eval(), random_rows().requires_grad_()
    weights = random_rows(seed=1)
    (quantizer(x).vectors * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights)
    assert quantizer.codebooks.grad is None or not quantizer.codebooks.grad.any()


def recommendation_gradients(estimator, codebook_update="gradient"):
    """Of a loss of the vectors alone: the input's gradient (B, D), its norm at each codeword and who is used (L, K)."""
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(6, 3, 8, codebook_update=codebook_update, estimator=estimator).eval()
    x = random_rows().requires_grad_()
    quantized = quantizer(x)
    (quantized.vectors * random_rows(seed=1)).sum().backward()
    grad = quantizer.codebooks.grad
    grad = torch.zeros_like(quantizer.codebooks) if grad is None else grad
    used = torch.stack([torch.bincount(codes, minlength=8) > 0 for codes in quantized.codes.unbind(-1)])  # (L, K)
    return torch.zeros_like(x) if x.grad is None else x.grad, grad.norm(dim=-1), used


@pytest.mark.parametrize("estimator", ["gather", "gather_straight_through", "rotation"])
def test_a_loss_of_the_vectors_reaches_every_used_codeword_and_no_other(estimator):
    _, codebooks, used = recommendation_gradients(estimator)
    assert torch.isfinite(codebooks).all()
    assert torch.equal(codebooks > 0, used)


@pytest.mark.parametrize(
    ("estimator", "reached"),
    [("straight_through", True), ("gather", False), ("gather_straight_through", True), ("rotation", True)],
)
def test_a_loss_of_the_vectors_reaches_the_input_where_the_estimator_says_so(estimator, reached):
    x, _, _ = recommendation_gradients(estimator)
    assert bool((x != 0).all()) if reached else not x.any()


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
def test_rotation_gives_the_input_another_gradient_than_straight_through_does(codebook_update):
    turned, _, _ = recommendation_gradients("rotation", codebook_update)
    straight, _, _ = recommendation_gradients("straight_through", codebook_update)
    assert not torch.allclose(turned, straight, atol=0.1)


def test_words_are_the_chosen_codewords_whose_sum_the_vectors_are():
    torch.manual_seed(0)
    quantizer, x = ResidualQuantizer(6, 3, 8), random_rows()
    quantized = quantizer.eval()(x)
    for level in range(3):
        assert torch.equal(quantized.words[:, level], quantizer.codebooks[level, quantized.codes[:, level]])
    torch.testing.assert_close(quantized.words.sum(1), quantized.vectors)


@pytest.mark.parametrize("estimator", ["straight_through", "gather", "gather_straight_through", "rotation"])
def test_a_loss_of_the_words_reaches_their_codebook_alone_whatever_the_estimator(estimator):
    quantizer = ResidualQuantizer(6, 3, 8, codebook_update="gradient", estimator=estimator)
    x = random_rows().requires_grad_()
    quantized = quantizer(x)
    quantized.words[:, 0].sum().backward()
    counts = torch.bincount(quantized.codes[:, 0], minlength=8).float()
    torch.testing.assert_close(quantizer.codebooks.grad[0], counts[:, None].expand(-1, 6))
    assert not quantizer.codebooks.grad[1:].any()
    assert x.grad is None


def test_words_carry_no_gradient_where_moving_averages_are_the_codebooks():
    assert not ResidualQuantizer(6, 3, 8)(random_rows().requires_grad_()).words.requires_grad


def test_the_paper_form_of_the_loss_is_its_printed_formula():
    """|x - sum_m e_m|^2 + beta sum_m |sg(r_m) - e_m|^2: its value, and the gradients of its two terms by hand."""
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(6, 2, 8, commitment=0.3, codebook_update="gradient", loss_form="paper").eval()
    x = random_rows(10).requires_grad_()
    loss = quantizer(x).loss
    loss.backward()
    codebooks = quantizer.codebooks.detach()
    expected, to_x, to_codebooks = 0.0, torch.zeros_like(x), torch.zeros_like(codebooks)
    for i, row in enumerate(x.detach()):
        codes, residuals = quantize_by_hand(row, codebooks)
        words = [codebooks[level, code] for level, code in enumerate(codes)]
        left = row - sum(words)
        expected += float(left.square().sum()) / 10
        to_x[i] = 2 * left / 10
        for level, code in enumerate(codes):
            expected += 0.3 * float((residuals[level] - words[level]).square().sum()) / 10
            to_codebooks[level, code] += (-2 * left + 0.3 * 2 * (words[level] - residuals[level])) / 10
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(x.grad, to_x)
    torch.testing.assert_close(quantizer.codebooks.grad, to_codebooks)


def test_in_gradient_mode_each_chosen_codeword_and_no_other_gets_the_gradient_of_the_codebook_loss():
    torch.manual_seed(0)
    quantizer, x = ResidualQuantizer(6, 2, 8, codebook_update="gradient").eval(), random_rows(10)
    quantizer(x).loss.backward()
    expected = torch.zeros_like(quantizer.codebooks)
    for row in x:
        codes, residuals = quantize_by_hand(row, quantizer.codebooks.detach())
        for level, code in enumerate(codes):
            expected[level, code] += 2 * (quantizer.codebooks[level, code].detach() - residuals[level]) / len(x)
    torch.testing.assert_close(quantizer.codebooks.grad, expected)


def test_commitment_pulls_the_input_towards_its_codeword_at_every_level():
    torch.manual_seed(0)
    quantizer, x = ResidualQuantizer(6, 2, 8, commitment=0.25).eval(), random_rows(10).requires_grad_()
    quantizer(x).loss.backward()
    for row, grad in zip(x.detach(), x.grad, strict=True):
        codes, residuals = quantize_by_hand(row, quantizer.codebooks)
        errors = [residuals[level] - quantizer.codebooks[level, codes[level]] for level in range(2)]
        torch.testing.assert_close(grad, 2 * 0.25 * sum(errors) / 10)


def test_ema_codebooks_follow_the_hand_formula_over_several_steps():
    torch.manual_seed(0)
    decay, num_codes = 0.8, 4
    quantizer = ResidualQuantizer(6, 2, num_codes, ema_decay=decay, dead_code_threshold=0)
    assert list(quantizer.parameters()) == []  # nothing for an optimizer to fight over
    usage = torch.full((2, num_codes), 1 / num_codes)
    codebooks = quantizer.codebooks.clone()
    sums = codebooks / num_codes
    for step in range(3):
        x = random_rows(20, seed=step)
        quantizer(x)
        chosen = [quantize_by_hand(row, codebooks) for row in x]
        codebooks = codebooks.clone()
        for level in range(2):
            for code in range(num_codes):
                hits = [residuals[level] for codes, residuals in chosen if codes[level] == code]
                usage[level, code] = decay * usage[level, code] + (1 - decay) * len(hits) / len(x)
                total = sum(hits, torch.zeros(6))
                sums[level, code] = decay * sums[level, code] + (1 - decay) * total / len(x)
                codebooks[level, code] = sums[level, code] / usage[level, code]
        torch.testing.assert_close(quantizer.usage, usage)
        torch.testing.assert_close(quantizer.codebooks, codebooks)


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
def test_evaluation_changes_no_state(codebook_update):
    quantizer = ResidualQuantizer(6, 2, 4, codebook_update=codebook_update).eval()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer(random_rows())
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
def test_a_dead_code_is_revived_as_a_residual_of_the_batch(codebook_update):
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(6, 1, 4, codebook_update=codebook_update, ema_decay=0.5, dead_code_threshold=0.1)
    with torch.no_grad():
        quantizer.codebooks[0, 3] = 1e3  # no row will ever choose it
        if codebook_update == "ema":
            quantizer.sums.copy_(quantizer.usage[..., None] * quantizer.codebooks)
    x = random_rows(64)
    steps = 0
    while quantizer.codebooks[0, 3].max() > 100:
        quantizer(x)
        steps += 1
        assert steps < 10
    assert steps == 4  # 0.5 ** 4 of the fair share is the first below a tenth of it
    assert any(torch.equal(quantizer.codebooks[0, 3], row) for row in x)
    assert (quantizer.eval()(x).codes == 3).any()
    assert quantizer.usage[0, 3] == 1 / 4


def test_without_a_threshold_a_dead_code_stays_where_it_is():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(6, 1, 4, ema_decay=0.5, dead_code_threshold=0)
    quantizer.codebooks[0, 3] = 1e3
    quantizer.sums.copy_(quantizer.usage[..., None] * quantizer.codebooks)
    for _ in range(300):  # long enough for its moving averages to underflow
        quantizer(random_rows(64))
    torch.testing.assert_close(quantizer.codebooks[0, 3], torch.full((6,), 1e3))


def test_kmeans_initialisation_rebuilds_better_than_random_codebooks_at_every_level():
    torch.manual_seed(0)
    x, quantizer = random_rows(300), ResidualQuantizer(6, 3, 8).eval()
    random_error = (quantizer(x).vectors - x).square().sum()
    quantizer.init_from_data(x)
    assert quantizer.initialised
    partial = [quantizer.codebooks[: level + 1] for level in range(3)]
    codes = quantizer.encode(x)
    errors = [(sum(c[m][codes[:, m]] for m in range(len(c))) - x).square().sum() for c in partial]
    assert errors[2] < errors[1] < errors[0] < x.square().sum()
    assert errors[2] < 0.5 * random_error


def test_first_level_of_the_initialisation_is_a_k_means_optimum():
    """Each centre is the mean of the rows nearest to it, which a random choice of rows is not."""
    x = random_rows(200)
    codebook = kmeans_codebook(x, 5, num_iterations=300)
    nearest = [min(range(5), key=lambda k: float((row - codebook[k]).square().sum())) for row in x]
    for k in range(5):
        mean = torch.stack([row for row, code in zip(x, nearest, strict=True) if code == k]).mean(0)
        torch.testing.assert_close(codebook[k], mean, atol=0.05, rtol=0)


def test_after_initialisation_the_moving_averages_agree_with_the_codebooks():
    x, quantizer = random_rows(100), ResidualQuantizer(6, 2, 8)
    quantizer.init_from_data(x)
    codes = quantizer.encode(x)
    for level in range(2):
        shares = [float((codes[:, level] == code).float().mean()) for code in range(8)]
        torch.testing.assert_close(quantizer.usage[level], torch.tensor(shares))
    torch.testing.assert_close(quantizer.sums, quantizer.usage[..., None] * quantizer.codebooks)


def test_fewer_distinct_rows_than_codes_are_kept_exactly():
    x = random_rows(3).repeat(5, 1)
    quantizer = ResidualQuantizer(6, 2, 8).eval()
    quantizer.init_from_data(x)
    torch.testing.assert_close(quantizer.decode(quantizer.encode(x)), x)
    assert len(torch.unique(quantizer.encode(x), dim=0)) == 3


def test_initialisation_is_the_same_for_the_same_seed():
    x = random_rows(100)
    first, second = ResidualQuantizer(6, 2, 8), ResidualQuantizer(6, 2, 8)
    first.init_from_data(x, seed=3)
    second.init_from_data(x, seed=3)
    assert torch.equal(first.codebooks, second.codebooks)


def test_equal_rows_far_from_the_origin_get_the_nearest_code():
    """Where |a|^2 - 2ab + |b|^2 in float32 has lost every digit that tells the codewords apart."""
    codebook = torch.full((3, 64), 1e4) + torch.tensor([[0.0], [0.5], [1.0]])
    rows = torch.full((67, 64), 1e4) + torch.tensor([[0.0], [0.5], [1.0]]).repeat(23, 1)[:67]
    assert nearest_code(rows, codebook).tolist() == [i % 3 for i in range(67)]


def close_calls():
    """Rows and codewords of float32 whose distances are hard to tell apart, by name."""
    rows, codebook = random_rows(200, 16), random_rows(9, 16, seed=1)
    return {
        "ordinary": (rows, codebook),
        "one direction": (rows * 1e-4 + 7, codebook * 1e-4 + 7),
        "repeated codewords": (rows, codebook[:3].repeat(3, 1)),
        "rows half way": ((codebook[:-1] + codebook[1:]) / 2, codebook),
        "codewords that are rows": (codebook, codebook.repeat(2, 1)),
        "one far codeword": (rows, torch.cat([codebook, 1e6 + codebook[:1]])),
        "huge": (rows * 1e18, codebook * 1e18),
        "infinite": (torch.cat([torch.full_like(rows[:, :1], torch.inf), rows[:, 1:]], 1), codebook),
        "not a number": (rows.masked_fill(rows[:, :1] > 1.5, torch.nan), codebook),
    }


@pytest.mark.parametrize("name", close_calls())
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_the_nearest_code_is_that_of_distances_by_differences_whatever_the_precision_of_products(name, precision):
    rows, codebook = close_calls()[name]
    exact = torch.cdist(rows, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(nearest_code(rows, codebook), exact)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
def test_a_state_dict_restores_codes_and_further_training_exactly(codebook_update):
    torch.manual_seed(0)
    first = ResidualQuantizer(6, 3, 8, codebook_update=codebook_update)
    first.init_from_data(random_rows(100))
    first(random_rows(50, seed=1))
    second = ResidualQuantizer(6, 3, 8, codebook_update=codebook_update)
    second.load_state_dict(first.state_dict())
    assert second.initialised
    for quantizer in (first, second):
        torch.manual_seed(1)
        quantizer(random_rows(50, seed=2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert torch.equal(first.encode(random_rows(seed=3)), second.encode(random_rows(seed=3)))


def test_half_precision_rows_are_quantized_in_full_precision():
    quantizer, x = ResidualQuantizer(6, 3, 8).eval(), random_rows().bfloat16()
    assert quantizer(x).vectors.dtype == torch.float32
    assert torch.equal(quantizer(x).codes, quantizer.encode(x.float()))


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
def test_gumbel_mixes_codewords_in_training_and_takes_the_nearest_in_evaluation(codebook_update):
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(6, 2, 8, codebook_update=codebook_update, estimator="gumbel", dead_code_threshold=0)
    books, x = quantizer.codebooks.detach().clone(), random_rows()
    torch.manual_seed(1)
    trained = quantizer(x)
    torch.manual_seed(1)
    first = gumbel_words(x, books[0], 0.2)
    second = gumbel_words(x - first, books[1], 0.2)
    torch.testing.assert_close(trained.words.detach(), torch.stack([first, second], 1))
    torch.testing.assert_close(trained.vectors.detach(), first + second)
    for row, codes in zip(x, trained.codes[:, 0].tolist(), strict=True):
        assert codes == quantize_by_hand(row, books)[0][0]
    quantized = quantizer.eval()(x)
    assert torch.equal(quantized.vectors, quantizer.decode(quantizer.encode(x)))
    assert torch.equal(quantized.codes, quantizer.encode(x))


def test_gumbel_passes_the_gradient_to_the_input_and_in_gradient_mode_to_every_codeword():
    for codebook_update in ("ema", "gradient"):
        torch.manual_seed(0)
        quantizer = ResidualQuantizer(6, 2, 8, codebook_update=codebook_update, estimator="gumbel", temperature=1.0)
        x = random_rows().requires_grad_()
        (quantizer(x).vectors * random_rows(seed=1)).sum().backward()
        assert (x.grad != 0).all()
        if codebook_update == "gradient":
            assert (quantizer.codebooks.grad.norm(dim=-1) > 0).all()


def test_a_temperature_near_zero_takes_the_nearest_codeword_and_a_high_one_mixes_all():
    torch.manual_seed(0)
    low, high = (ResidualQuantizer(6, 1, 8, estimator="gumbel", temperature=t) for t in (1e-5, 1e4))
    high.load_state_dict(low.state_dict())
    books, x = low.codebooks.clone(), random_rows(200)
    torch.testing.assert_close(low(x).words[:, 0], books[0][nearest_code(x, books[0])])
    assert torch.cdist(high(x).words[:, 0], books[0]).min() > 1e-3


def crowded():
    """Rows that nearly all want one code of the last level, in two copies of a quantizer: with Sinkhorn and without."""
    torch.manual_seed(0)
    plain, balanced = (ResidualQuantizer(6, 2, 4, dead_code_threshold=0, sinkhorn=s) for s in (None, 0.003))
    plain.codebooks[1, 1:] += 0.7
    balanced.load_state_dict(plain.state_dict())
    return random_rows(40), plain, balanced


def test_sinkhorn_spreads_the_last_level_over_its_codes_in_training_and_no_other_level():
    x, plain, balanced = crowded()
    residual = x - plain.codebooks[0][plain.encode(x)[:, 0]]
    expected = balanced_codes(torch.cdist(residual, plain.codebooks[1]).square())
    without, codes = plain(x).codes, balanced(x).codes
    assert torch.bincount(without[:, 1], minlength=4).max() > 20
    assert torch.bincount(codes[:, 1], minlength=4).max() <= 13
    assert torch.equal(codes[:, 0], without[:, 0])
    assert torch.equal(codes[:, 1], expected)


def test_sinkhorn_moves_the_codebooks_as_it_assigns_and_leaves_evaluation_to_the_nearest_code():
    x, plain, balanced = crowded()
    assert torch.equal(balanced.eval()(x).codes, plain.eval()(x).codes)
    assert torch.equal(balanced.encode(x), plain.encode(x))
    codes = balanced.train()(x).codes[:, 1]
    shares = torch.bincount(codes, minlength=4) / 40
    torch.testing.assert_close(balanced.usage[1], 0.99 / 4 + 0.01 * shares)


def test_more_sinkhorn_iterations_and_another_epsilon_assign_otherwise():
    x, _, balanced = crowded()
    state = {name: value.clone() for name, value in balanced.state_dict().items()}
    found = []
    for epsilon, iterations in ((0.003, 100), (0.003, 1), (1.0, 100)):
        balanced.load_state_dict(state)
        balanced.sinkhorn, balanced.sinkhorn_iterations = epsilon, iterations
        found.append(balanced(x).codes)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


RANK = """
import sys
import torch
import torch.distributed as dist
from recsys_lightning.nn.quantize import ResidualQuantizer
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
x = torch.randn(30, 4)
quantizer = ResidualQuantizer(4, 2, 3, ema_decay=0.5, dead_code_threshold=0.0)
quantizer(x[:10] if rank == 0 else x[10:])
plain = quantizer.codebooks.clone()
torch.manual_seed(rank)
quantizer.dead_code_threshold = 0.999
quantizer(x + rank)
revived = quantizer.codebooks.clone()
quantizer.init_from_data(x + rank)
learned = ResidualQuantizer(4, 2, 3, codebook_update="gradient", ema_decay=0.5, dead_code_threshold=0.999)
with torch.no_grad():
    learned.codebooks.copy_(plain)
learned(x[:10] if rank == 0 else x[10:])
tensors = [plain, revived, quantizer.codebooks, learned.codebooks.detach(), learned.usage]
torch.save(tensors, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_codebooks_of_two_ranks_are_equal_and_those_of_one_process(tmp_path):
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    torch.manual_seed(0)
    x = torch.randn(30, 4)
    alone = ResidualQuantizer(4, 2, 3, ema_decay=0.5, dead_code_threshold=0.0)
    alone(x)
    torch.testing.assert_close(one[0], alone.codebooks)
    alone = ResidualQuantizer(4, 2, 3, codebook_update="gradient", ema_decay=0.5, dead_code_threshold=0.0)
    with torch.no_grad():
        alone.codebooks.copy_(one[0])
    alone(x)
    dead = alone.usage < 0.999 / 3
    assert dead.any()
    assert torch.equal((one[3] != one[0]).any(-1), dead)  # the codes that all rows together leave dead
    torch.testing.assert_close(one[4], alone.usage.masked_fill(dead, 1 / 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_codes": 1}, "num_codes=1"),
        ({"num_levels": 0}, "num_levels=0"),
        ({"codebook_update": "sgd"}, "'sgd'"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"commitment": -1.0}, "commitment"),
        ({"dead_code_threshold": 2.0}, "dead_code_threshold"),
        ({"estimator": "copy"}, "straight_through, gather, gather_straight_through, rotation, gumbel, got 'copy'"),
        ({"loss_form": "tiger"}, "'tiger'"),
        ({"loss_form": "paper"}, "set codebook_update to 'gradient'"),
        ({"estimator": "gather"}, "estimator='gather' .* set codebook_update to 'gradient'"),
        ({"estimator": "gather_straight_through"}, "set codebook_update to 'gradient'"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"sinkhorn": 0.0}, "epsilon .* got 0.0"),
        ({"sinkhorn": 0.003, "sinkhorn_iterations": 0}, "1 iteration or more, got 0"),
        ({"sinkhorn": 0.003, "estimator": "gumbel"}, "leave sinkhorn at None"),
    ],
)
def test_an_error_names_the_argument(arguments, message):
    with pytest.raises(InputError, match=message):
        ResidualQuantizer(6, **arguments)


def test_an_mlp_has_activation_and_dropout_between_layers_only():
    kinds = [type(layer) for layer in MLP([4, 8, 6, 2], dropout=0.1, activation=nn.GELU)]
    assert kinds == [nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.GELU, nn.Dropout, nn.Linear]
    assert MLP([4, 8, 6, 2])(torch.zeros(3, 5, 4)).shape == (3, 5, 2)
    assert [type(layer) for layer in MLP([4, 2])] == [nn.Linear]
    with pytest.raises(InputError, match=r"\[4\]"):
        MLP([4])
