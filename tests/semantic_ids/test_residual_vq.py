"""Residual VQ: the quantizer of an RQ-VAE with nothing around it."""

import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.residual_vq import ResidualVQ


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(tokenizer, rows, num_steps=30):
    parameters = list(tokenizer.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.02) if parameters else None
    for _ in range(num_steps):
        losses = tokenizer.losses(rows)
        if optimizer is not None:
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    return tokenizer.eval()


def error(tokenizer, rows):
    return float((tokenizer.target(rows) - tokenizer.reconstruct(rows)).square().sum(-1).mean())


def test_the_loss_is_what_is_left_after_each_level():
    rows = random(20, 6)
    tokenizer = ResidualVQ(6, 2, 4).fit(rows).eval()
    expected = 0.0
    for row, codes in zip(F.normalize(rows, dim=-1), tokenizer.encode(rows).tolist(), strict=True):
        residual = row
        for codebook, code in zip(tokenizer.quantizer.codebooks, codes, strict=True):
            distances = [float((residual - word).square().sum().detach()) for word in codebook]
            assert distances[code] == min(distances)
            residual = residual - codebook[code]
            expected += float(residual.detach().square().sum()) / 20
    assert list(tokenizer.losses(rows)) == ["quantization"]
    assert float(tokenizer.losses(rows)["quantization"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_training_lowers_what_is_lost_from_a_hasty_start(update):
    rows = random(200, 6)
    tokenizer = ResidualVQ(6, 2, 8, codebook_update=update, ema_decay=0.8, kmeans_iterations=1).fit(rows)
    before = error(tokenizer.eval(), rows)
    assert error(trained(tokenizer.train(), rows), rows) < 0.98 * before


def test_moving_averages_leave_nothing_to_the_optimizer():
    tokenizer = ResidualVQ(6, 2, 4, codebook_update="ema")
    assert tokenizer.losses(random(5, 6)) == {}
    assert list(tokenizer.parameters()) == []
    assert [name for name, _ in ResidualVQ(6, 2, 4).named_parameters()] == ["quantizer.codebooks"]


def test_a_dead_code_is_set_anew_unless_the_threshold_is_zero():
    for threshold, revived in ((0.2, True), (0.0, False)):
        tokenizer = ResidualVQ(6, 1, 4, dead_code_threshold=threshold, ema_decay=0.1).fit(random(50, 6))
        with torch.no_grad():
            tokenizer.quantizer.codebooks[0, 2] = 100
        for _ in range(3):
            tokenizer.losses(random(50, 6))
        assert (float(tokenizer.quantizer.codebooks[0, 2].detach().abs().max()) < 10) is revived


def test_seed_normalisation_and_first_iterations_count():
    rows = random(200, 6) * torch.linspace(0.3, 3, 200)[:, None]
    first = ResidualVQ(6, 2, 8, kmeans_iterations=10).fit(rows)
    assert torch.equal(first.encode(rows), first.encode(3 * rows))
    plain = ResidualVQ(6, 2, 8, normalize=False).fit(rows)
    assert not torch.equal(plain.encode(rows), plain.encode(3 * rows))
    assert not torch.equal(first.quantizer.codebooks, ResidualVQ(6, 2, 8, seed=1).fit(rows).quantizer.codebooks)
    assert error(first, rows) < error(ResidualVQ(6, 2, 8, kmeans_iterations=1).fit(rows), rows)


def test_last_distances_are_what_each_last_code_would_leave():
    rows = random(30, 6)
    tokenizer = ResidualVQ(6, 2, 4).fit(rows)
    codes = tokenizer.encode(rows)
    found = tokenizer.last_distances(rows, codes)
    for last in range(4):
        tried = torch.stack([codes[:, 0], torch.full((30,), last)], -1)
        expected = (tokenizer.target(rows) - tokenizer.decode(tried)).square().sum(-1)
        torch.testing.assert_close(found[:, last], expected, atol=1e-5, rtol=1e-4)


def test_a_state_dict_restores_the_codes():
    rows = random(60, 6)
    first, second = trained(ResidualVQ(6, 2, 4).fit(rows), rows, 3), ResidualVQ(6, 2, 4)
    assert not second.fitted
    second.load_state_dict(first.state_dict())
    assert second.fitted
    assert torch.equal(first.encode(rows), second.encode(rows))


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="num_codes=1"):
        ResidualVQ(6, 2, 1)
    with pytest.raises(InputError, match="codebook_update must be 'ema' or 'gradient', got 'sgd'"):
        ResidualVQ(6, codebook_update="sgd")
    with pytest.raises(InputError, match="set embedding_dim to 5"):
        ResidualVQ(6).fit(random(9, 5))
