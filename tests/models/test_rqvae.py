"""RQ-VAE on data with a known answer."""

import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.errors import InputError
from recsys_lightning.models.rqvae import RQVAE


def clustered(num_clusters=6, num_each=10, dim=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(num_clusters, dim, generator=g)
    return (centres[:, None] + 0.05 * torch.randn(num_clusters, num_each, dim, generator=g)).flatten(0, 1)


def small(**arguments):
    torch.manual_seed(0)
    return RQVAE(
        **({"embedding_dim": 12, "hidden": (24,), "latent_dim": 4, "num_levels": 2, "num_codes": 8} | arguments)
    )


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
@pytest.mark.parametrize("estimator", ["straight_through", "rotation", "gumbel"])
def test_a_clustered_set_is_overfit_and_its_clusters_get_their_own_codes(codebook_update, estimator):
    rows, model = clustered(), small(codebook_update=codebook_update, estimator=estimator)
    model.fit(rows)
    before = model.eval().losses(rows)["reconstruction"].item()
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        torch.stack(list(model.losses(rows).values())).sum().backward()
        optimizer.step()
    model.eval()
    assert model.losses(rows)["reconstruction"].item() < 0.05 * before
    codes = [{tuple(row) for row in group.tolist()} for group in model.encode(rows).view(6, 10, 2)]
    assert all(not (one & other) for i, one in enumerate(codes) for other in codes[:i])


def test_losses_are_the_printed_formulas():
    rows, model = clustered(), small(reconstruction_weight=3.0, commitment=0.5, codebook_update="gradient").eval()
    losses = model.losses(rows)
    latents, rebuilt = model.encoder(rows).detach(), model.reconstruct(rows)
    reconstruction = sum(float(((x - y) ** 2).sum()) for x, y in zip(rows, rebuilt, strict=True)) / len(rows)
    quantization = 0.0
    for residual, codes in zip(latents, model.encode(rows), strict=True):
        for level in range(2):
            word = model.quantizer.codebooks[level, codes[level]].detach()
            quantization += 1.5 * float(((residual - word) ** 2).sum()) / len(rows)
            residual = residual - word
    assert set(losses) == {"reconstruction", "quantization"}
    assert losses["reconstruction"].item() == pytest.approx(3 * reconstruction, rel=1e-4)
    assert losses["quantization"].item() == pytest.approx(quantization, rel=1e-4)


@pytest.mark.parametrize("codebook_update", ["ema", "gradient"])
def test_the_losses_reach_every_parameter(codebook_update):
    model = small(codebook_update=codebook_update)
    torch.stack(list(model.losses(clustered()).values())).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_fit_sets_the_codebooks_on_the_encoders_outputs_and_keeps_the_mode():
    rows, model = clustered(), small(dropout=0.5).train()
    assert not model.fitted
    assert model.fit(rows) is model
    assert model.fitted
    assert model.training
    model.eval()
    latents = model.encoder(rows)
    error = (model.quantizer(latents).vectors - latents).square().sum()
    assert error < 0.05 * (latents - latents.mean(0)).square().sum()


def test_equal_embeddings_have_equal_codes():
    rows = clustered(num_each=3)
    model = small().fit(rows).eval()
    twins = model.encode(torch.cat([rows, rows]))
    assert torch.equal(twins[: len(rows)], twins[len(rows) :])


def test_a_state_dict_restores_codes_and_reconstructions():
    rows, first, second = clustered(), small(), small(seed=1)
    first.fit(rows)
    first.losses(rows)
    second.load_state_dict(first.state_dict())
    assert second.fitted
    assert torch.equal(first.eval().encode(rows), second.eval().encode(rows))
    assert torch.equal(first.reconstruct(rows), second.reconstruct(rows))


def test_normalised_embeddings_are_what_is_encoded_and_rebuilt():
    rows = clustered()
    scaled, plain = small(normalize=True).eval(), small().eval()
    plain.load_state_dict(scaled.state_dict())
    unit = F.normalize(rows, dim=-1)
    assert torch.equal(scaled.encode(5 * rows), plain.encode(unit))
    torch.testing.assert_close(scaled.losses(5 * rows), plain.losses(unit))


def test_encoder_and_decoder_mirror_each_other():
    model = RQVAE(20)
    sizes = [tuple(weight.shape) for weight in model.encoder.parameters() if weight.ndim == 2]
    mirror = [tuple(weight.shape)[::-1] for weight in model.decoder.parameters() if weight.ndim == 2][::-1]
    assert sizes == mirror == [(512, 20), (256, 512), (128, 256), (32, 128)]
    assert model.encode(torch.zeros(2, 20)).shape == (2, 3)


def first_gradient(**arguments):
    """Of the encoder's first weights, by the reconstruction of one training batch."""
    rows, model = clustered(), small(**arguments)
    model.fit(rows)
    torch.manual_seed(1)
    model.train().losses(rows)["reconstruction"].backward()
    return next(model.encoder.parameters()).grad


def test_every_way_to_pass_the_gradient_moves_the_encoder_in_a_way_of_its_own():
    ways = [{}, {"estimator": "rotation"}, {"estimator": "gumbel"}, {"estimator": "gumbel", "temperature": 1.0}]
    found = [first_gradient(**way) for way in ways]
    assert all(gradient.any() for gradient in found)
    assert not any(torch.allclose(a, b) for i, a in enumerate(found) for b in found[:i])


def test_sinkhorn_changes_what_the_last_codebook_learns_and_no_other():
    """Half of the rows are crowded about one place, so that nearest codes are used unevenly."""
    crowd = clustered()[:1] + 0.5 * torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    rows, states = torch.cat([clustered(num_each=2), crowd]), []
    for arguments in ({"sinkhorn": 0.003}, {}, {"sinkhorn": 0.003, "sinkhorn_iterations": 1}, {"sinkhorn": 1.0}):
        model = small(**arguments, dead_code_threshold=0.0)
        model.fit(rows)
        model.train().losses(rows)
        states.append(model.quantizer.codebooks)
    assert all(torch.equal(states[0][0], other[0]) for other in states[1:])
    assert not any(torch.equal(states[0][1], other[1]) for other in states[1:])


@pytest.mark.parametrize("estimator", ["gather", "gather_straight_through", "copy"])
def test_an_estimator_that_sends_the_reconstruction_to_the_codebooks_is_refused_with_the_reason(estimator):
    with pytest.raises(InputError, match=rf"straight_through, rotation, gumbel, got '{estimator}': the encoder learns"):
        small(estimator=estimator, codebook_update="gradient")


def test_bad_input_is_refused_with_the_cure():
    with pytest.raises(InputError, match="set embedding_dim to 7"):
        small().fit(torch.zeros(3, 7))
    with pytest.raises(InputError, match="reconstruction_weight"):
        small(reconstruction_weight=0.0)
