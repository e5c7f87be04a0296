"""Repairs of codebooks: dead codes come to life, what lives stays, and averages and optimizers agree with it."""

import pytest
import torch

from recsys_lightning.errors import InputError
from recsys_lightning.nn import codebook_repair
from recsys_lightning.nn.codebook_repair import Repaired, forget, install, raise_sinkhorn, reseed, reset_dead
from recsys_lightning.nn.quantize import ResidualQuantizer, residual_encode
from recsys_lightning.semantic_ids.usage import code_usage

ROWS, WIDTH, LEVELS, CODES = 400, 6, 3, 8


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    return torch.randn(ROWS, WIDTH)


@pytest.fixture
def healthy(vectors):
    quantizer = ResidualQuantizer(WIDTH, LEVELS, CODES)
    quantizer.init_from_data(vectors)
    return quantizer.codebooks.clone()


def collapsed(books: torch.Tensor, level: int) -> torch.Tensor:
    """The same codebooks, but of one level all codewords but the first are out of reach."""
    books = books.clone()
    books[level, 0] = 0
    books[level, 1:] += 1000
    return books


def perplexity(vectors, books) -> list[float]:
    return code_usage(residual_encode(vectors, books), CODES).perplexity.tolist()


@pytest.mark.parametrize("mend", [reset_dead, reseed])
@pytest.mark.parametrize("level", range(LEVELS))
def test_a_collapsed_level_and_those_after_it_use_more_than_half_of_their_codes_again(vectors, healthy, mend, level):
    ill = collapsed(healthy, level)
    assert perplexity(vectors, ill)[level] == 1
    repaired = mend(ill, vectors, level)
    assert min(perplexity(vectors, repaired.codebooks)) > CODES / 2
    assert torch.equal(repaired.codebooks[:level], healthy[:level]), "levels before it are well"
    assert not repaired.changed[:level].any()


def test_a_reset_keeps_codewords_that_are_used_and_sets_the_others_amid_what_is_left_of_rows(vectors, healthy):
    ill = collapsed(healthy, 1)
    repaired = reset_dead(ill, vectors, 1)
    assert repaired.changed[1].tolist() == [False] + [True] * (CODES - 1)
    assert torch.equal(repaired.codebooks[~repaired.changed], ill[~repaired.changed])
    codes = residual_encode(vectors, repaired.codebooks)
    left = vectors - healthy[0][codes[:, 0]]  # (N, D)
    for code in range(1, CODES):
        middle = left[codes[:, 1] == code].mean(0)
        assert (repaired.codebooks[1, code] - middle).norm() < 0.2 * middle.norm(), "k-means is nearly done"


@pytest.mark.parametrize("width", [6, 32, 128])
def test_codewords_are_shared_out_also_where_every_row_is_nearest_to_the_middle_of_all(width):
    """Rows of no structure in many dimensions, of which a codeword in their middle has them all."""
    torch.manual_seed(0)
    rows = torch.randn(3000, width)
    books = torch.full((1, 16, width), 1000.0)
    books[:, 0] = 0
    repaired = reset_dead(books, rows, 0)
    assert code_usage(residual_encode(rows, repaired.codebooks), 16).perplexity.item() > 8


def test_a_codebook_that_is_well_is_left_as_it_is(vectors, healthy):
    repaired = reset_dead(healthy, vectors, 0)
    assert not repaired.changed.any()
    assert torch.equal(repaired.codebooks, healthy)


def test_a_code_below_a_fifth_of_the_fair_share_is_dead_and_one_at_it_is_not():
    """Of 100 rows and 5 codes the fair share is 20 rows and a fifth of it 4."""
    books = torch.tensor([0.0, 10, 20, 30, 40])[None, :, None]  # (1, K, 1)
    for few, dead in ((3, True), (4, False)):
        counts = [few, 24, 24, 24, 100 - 72 - few]
        rows = torch.repeat_interleave(books[0], torch.tensor(counts), 0) + 0.1
        assert reset_dead(books, rows, 0).changed[0].tolist() == [dead, False, False, False, False]


def test_the_rows_that_are_served_worst_are_drawn_the_likeliest():
    """20 rows of 200 are far from the only codeword in use, which goes on to have the others."""
    rows = torch.cat([torch.full((180, 1), 0.1), torch.full((20, 1), 100.0)])
    books = torch.tensor([0.0, 1e6])[None, :, None]  # (1, 2, 1)
    drawn = [reset_dead(books, rows, 0, seed).codebooks[0, :, 0].tolist() for seed in range(20)]
    assert drawn.count([0.0, 100.0]) >= 19


def test_where_fewer_rows_are_different_than_codes_the_spare_codes_stay():
    rows = torch.tensor([[0.0], [1.0], [2.0]]).repeat(5, 1)
    books = (torch.arange(CODES) * 1000.0)[None, :, None]  # (1, K, 1)
    repaired = reset_dead(books, rows, 0)
    assert int(repaired.changed.sum()) == 2
    assert sorted(repaired.codebooks[0, :3, 0].tolist()) == [0, 1, 2]
    assert torch.equal(repaired.codebooks[0, 3:], books[0, 3:])


@pytest.mark.parametrize("mend", [reset_dead, reseed])
def test_the_same_seed_gives_the_same_codewords_and_the_random_numbers_of_a_training_stay(vectors, healthy, mend):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, other = (mend(collapsed(healthy, 0), vectors, 0, seed=3) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.codebooks, other.codebooks)
    assert not torch.equal(mend(collapsed(healthy, 0), vectors, 0, seed=4).codebooks, one.codebooks)


def test_a_catalogue_of_millions_is_looked_at_in_part(vectors, healthy, monkeypatch):
    monkeypatch.setattr(codebook_repair, "MOST_ROWS", 100)
    repaired = reset_dead(collapsed(healthy, 0), vectors, 0)
    kept = float(repaired.usage[0, 0]) * 100
    assert kept == pytest.approx(round(kept), abs=1e-4), "a share of 100 rows, not of 400"
    assert perplexity(vectors, repaired.codebooks)[0] > CODES / 2


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_installed_codewords_come_with_usage_and_averages_that_agree(vectors, healthy, update):
    quantizer = ResidualQuantizer(WIDTH, LEVELS, CODES, codebook_update=update)
    quantizer.init_from_data(vectors)
    usage = quantizer.usage.clone()
    with torch.no_grad():
        quantizer.codebooks.copy_(collapsed(healthy, 1))
    repaired = reset_dead(quantizer.codebooks, vectors, 1)
    install(quantizer, repaired)
    assert torch.equal(quantizer.codebooks, repaired.codebooks)
    assert torch.equal(quantizer.usage[0], usage[0]), "level 1 has no new codewords"
    shares = torch.stack([code.bincount(minlength=CODES) for code in quantizer.encode(vectors).T]) / ROWS
    expected = torch.where(repaired.changed, shares.clamp(min=1 / CODES), shares)
    touched = repaired.changed.any(1)
    assert touched.tolist()[:2] == [False, True]
    torch.testing.assert_close(quantizer.usage[touched], expected[touched])
    assert not (quantizer.usage[1] < 0.2 / CODES).any(), "none would be taken for dead in the next step"
    if update == "ema":
        torch.testing.assert_close(quantizer.sums / quantizer.usage[..., None], quantizer.codebooks)
    else:
        assert quantizer.codebooks.requires_grad
        assert quantizer.codebooks.is_leaf


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, 0.1),
    ],
    ids=["adamw", "momentum", "adagrad"],
)
def test_an_optimizer_forgets_new_codewords_and_no_others(make):
    books = torch.nn.Parameter(torch.randn(LEVELS, CODES, WIDTH))
    other = torch.nn.Parameter(torch.randn(LEVELS, CODES, WIDTH))
    optimizer = make([books, other])
    for _ in range(3):
        (books.square().sum() + other.square().sum()).backward()
        optimizer.step()
    changed = torch.zeros(LEVELS, CODES, dtype=torch.bool)
    changed[1, 2:5] = True
    kept = {name: value.clone() for name, value in optimizer.state[other].items()}
    forget(optimizer, books, changed)
    averages = [value for value in optimizer.state[books].values() if value.shape == books.shape]
    assert averages
    for value in averages:
        assert not value[changed].any()
        assert (value[~changed] != 0).all()
    assert all(torch.equal(value, optimizer.state[other][name]) for name, value in kept.items())


def test_an_optimizer_that_has_not_seen_the_codebooks_has_nothing_to_forget():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    forget(optimizer, torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
    assert not optimizer.state


def test_epsilon_begins_at_its_least_doubles_and_stops_at_its_bound():
    quantizer = ResidualQuantizer(WIDTH, LEVELS, CODES)
    found = [raise_sinkhorn(quantizer) for _ in range(12)]
    assert found[:4] == pytest.approx([0.003, 0.006, 0.012, 0.024])
    assert found[-1] == quantizer.sinkhorn == codebook_repair.LARGEST_SINKHORN
    quantizer.sinkhorn = 3.0
    assert raise_sinkhorn(quantizer) == 3.0, "what was set higher is not lowered"
    with pytest.raises(InputError, match="gumbel"):
        raise_sinkhorn(ResidualQuantizer(WIDTH, LEVELS, CODES, estimator="gumbel"))


def test_a_repair_changes_nothing_before_it_is_installed(vectors, healthy):
    ill = collapsed(healthy, 0)
    before = ill.clone()
    assert isinstance(reset_dead(ill, vectors, 0), Repaired)
    assert torch.equal(ill, before)
