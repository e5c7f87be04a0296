"""Balanced residual k-means: codes of a level have equally many items."""

import pytest
import torch

from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.balanced_kmeans import BalancedResidualKMeans
from recsys_lightning.semantic_ids.health import reconstruction_error
from recsys_lightning.semantic_ids.residual_kmeans import ResidualKMeans
from recsys_lightning.semantic_ids.tokenizer import rebuilt


def lopsided(num_rows=130, dim=6, seed=0):
    """Rows of which most lie in one small place."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, dim, generator=g)
    rows[: 3 * num_rows // 4] = torch.eye(dim)[0] + 0.1 * rows[: 3 * num_rows // 4]
    return rows


def sizes(codes, num_codes):
    return torch.stack([torch.bincount(level, minlength=num_codes) for level in codes.unbind(-1)])  # (L, K)


@pytest.mark.parametrize("num_rows", [128, 130, 5])
def test_every_code_of_every_level_has_equally_many_items_or_one_more(num_rows):
    rows = lopsided(num_rows)
    codes = BalancedResidualKMeans(6, 3, 8).fit(rows).assign(rows)
    assert codes.shape == (num_rows, 3)
    held = sizes(codes, 8)
    assert set(held.flatten().tolist()) <= {num_rows // 8, -(-num_rows // 8)}
    plain = ResidualKMeans(6, 3, 8).fit(rows)
    if num_rows > 8:
        assert sizes(plain.assign(rows), 8)[0].max() > 2 * num_rows / 8


def test_another_catalogue_is_balanced_as_well():
    tokenizer = BalancedResidualKMeans(6, 2, 8).fit(lopsided())
    held = sizes(tokenizer.assign(lopsided(88, seed=1)), 8)
    assert (held == 11).all()


def test_a_row_by_itself_gets_nearly_always_the_code_that_it_has_in_the_catalogue():
    rows = lopsided(400)
    tokenizer = BalancedResidualKMeans(6, 2, 8).fit(rows)
    together, alone = tokenizer.assign(rows), torch.cat([tokenizer.encode(row[None]) for row in rows])
    assert (together == alone).all(-1).float().mean() > 0.95
    assert torch.equal(alone, tokenizer.encode(rows))


def test_a_code_by_itself_is_that_of_the_least_distance_plus_price():
    rows = lopsided(80)
    tokenizer = BalancedResidualKMeans(6, 2, 4).fit(rows)
    for row, codes in zip(tokenizer.target(rows), tokenizer.encode(rows).tolist(), strict=True):
        residual = row
        for codebook, prices, code in zip(tokenizer.codebooks, tokenizer.prices, codes, strict=True):
            paid = [
                float((residual - word).square().sum() + price) for word, price in zip(codebook, prices, strict=True)
            ]
            assert paid[code] == pytest.approx(min(paid), abs=1e-5)
            residual = residual - codebook[code]


def test_balance_costs_little_and_iterations_pay():
    rows = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    error = {}
    for iterations in (1, 15):
        tokenizer = BalancedResidualKMeans(6, 2, 8, num_iterations=iterations).fit(rows)
        error[iterations] = reconstruction_error(rebuilt(tokenizer, rows, tokenizer.assign(rows)))
    plain = ResidualKMeans(6, 2, 8).fit(rows)
    assert error[15] < error[1]
    assert error[15] < 1.15 * reconstruction_error(rebuilt(plain, rows, plain.encode(rows)))


def test_fitting_twice_gives_the_same_and_another_seed_another_table():
    rows = lopsided()
    first, again, other = (BalancedResidualKMeans(6, 2, 8, seed=seed).fit(rows).assign(rows) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_state_dict_restores_assignment_and_single_codes():
    rows = lopsided()
    first, second = BalancedResidualKMeans(6, 2, 8).fit(rows), BalancedResidualKMeans(6, 2, 8)
    second.load_state_dict(first.state_dict())
    assert second.fitted
    assert torch.equal(first.assign(rows), second.assign(rows))
    assert torch.equal(first.encode(rows), second.encode(rows))


def test_what_cannot_be_done_is_refused():
    tokenizer = BalancedResidualKMeans(6)
    with pytest.raises(RuntimeError, match=r"BalancedResidualKMeans.assign was called before fit"):
        tokenizer.assign(lopsided())
    with pytest.raises(RuntimeError, match=r"BalancedResidualKMeans.encode was called before fit"):
        tokenizer.encode(lopsided())
    with pytest.raises(InputError, match="set embedding_dim to 5"):
        tokenizer.fit(lopsided(dim=5))
