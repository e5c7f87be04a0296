"""The transformer's promises: causality, padding that changes nothing, and a cache that changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recsys_lightning.nn.transformer import Attention, Dropout, KeyValues, Transformer, _attend, drop_out


def build(direction, layers=2):
    torch.manual_seed(0)
    return Transformer(16, layers, 4, 32, 0.1, direction).eval()


def test_one_layer_equals_torch_encoder_layer():
    ours = build("bidirectional", layers=1)
    theirs = nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    block = ours.layers[0]
    theirs.self_attn.in_proj_weight.data = block.attention.project.weight.data
    theirs.self_attn.in_proj_bias.data = block.attention.project.bias.data
    theirs.self_attn.out_proj.load_state_dict(block.attention.output.state_dict())
    theirs.linear1.load_state_dict(block.feedforward[0].state_dict())
    theirs.linear2.load_state_dict(block.feedforward[3].state_dict())
    theirs.norm1.load_state_dict(block.attention_norm.state_dict())
    theirs.norm2.load_state_dict(block.feedforward_norm.state_dict())
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(ours(x)[0], ours.norm(theirs(x)), atol=1e-5, rtol=1e-5)


def test_a_causal_token_sees_nothing_after_it():
    model, x = build("causal"), torch.randn(2, 6, 16)
    changed = x.clone()
    changed[:, 4:] = torch.randn(2, 2, 16)
    torch.testing.assert_close(model(x)[0][:, :4], model(changed)[0][:, :4])
    assert not torch.allclose(model(x)[0][:, 4:], model(changed)[0][:, 4:])


def test_masked_tokens_change_nothing_in_a_bidirectional_stack():
    model, x = build("bidirectional"), torch.randn(2, 6, 16)
    mask = torch.arange(6) < 4
    longer = model(x, mask.expand(2, -1))[0][:, :4]
    torch.testing.assert_close(longer, model(x[:, :4])[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_extending_a_shared_prefix_equals_running_each_beam_whole(num_beams):
    model = build("causal")
    prefix, added = torch.randn(2, 5, 16), torch.randn(2, num_beams, 3, 16)
    lengths = torch.tensor([5, 3])
    mask = torch.arange(5) < lengths[:, None]
    _, cache = model(prefix)
    own, stepwise = None, []
    for step in range(3):
        state, own = model.extend(added[:, :, step], cache, mask, own)
        stepwise.append(state)
    for row in range(2):
        for beam in range(num_beams):
            whole = torch.cat([prefix[row, : lengths[row]], added[row, beam]])[None]
            expected = model(whole)[0][0, lengths[row] :]
            found = torch.stack([state[row, beam] for state in stepwise])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert isinstance(own[0], KeyValues)
    assert own[0].keys.shape == (2, 4, num_beams, 3, 4)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_state_at_one_place_is_that_of_the_whole_run_and_so_is_the_cache(layers):
    model, x, at = build("causal", layers), torch.randn(3, 6, 16), torch.tensor([5, 0, 3])
    states, cache = model(x)
    state, pieces = model.state_at(x, at)
    torch.testing.assert_close(state, states[torch.arange(3), at], atol=1e-5, rtol=1e-5)
    for whole, piece in zip(cache, pieces, strict=True):
        torch.testing.assert_close(tuple(piece), tuple(whole))
        assert piece.keys.is_contiguous()
        assert piece.values.is_contiguous()


@pytest.mark.parametrize("layers", [1, 2])
def test_the_first_state_alone_is_that_of_the_whole_run_and_teaches_the_same(layers):
    model, x = build("bidirectional", layers), torch.randn(3, 6, 16, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([[6], [1], [4]])
    whole, alone = model(x, mask)[0][:, 0], model.first(x, mask)
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.first(x), model(x)[0][:, 0], atol=1e-5, rtol=1e-5)
    weight = torch.randn(3, 16)
    learned = [x, *model.parameters()]
    expected = torch.autograd.grad((whole * weight).sum(), learned)
    for found, wanted in zip(torch.autograd.grad((alone * weight).sum(), learned), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_shortcuts_of_the_other_direction_are_refused():
    x = torch.randn(1, 2, 16)
    with pytest.raises(ValueError, match="first is for bidirectional"):
        build("causal").first(x)
    with pytest.raises(ValueError, match="state_at is for causal"):
        build("bidirectional").state_at(x, torch.tensor([0]))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_scales_the_rest(share):
    torch.manual_seed(0)
    x = torch.full((301, 333), 2.0, requires_grad=True)  # no multiple of four
    dropped = drop_out(x, share)
    assert float((dropped == 0).float().mean()) == pytest.approx(share, abs=0.01)
    kept = dropped[dropped != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 2 / (1 - share)), rtol=2e-4, atol=0)
    dropped.sum().backward()
    torch.testing.assert_close(x.grad * 2, dropped)  # what was dropped learns nothing


def test_dropout_noise_is_independent_from_element_to_element_and_comes_from_the_seed():
    """Four elements share one random number: neither they nor neighbouring numbers may know of one another."""
    torch.manual_seed(0)
    kept = (drop_out(torch.ones(40_000, 8), 0.3) != 0).double()
    correlation = torch.corrcoef(kept.T) - torch.eye(8)
    assert correlation.abs().max() < 0.02
    torch.manual_seed(0)
    assert torch.equal((drop_out(torch.ones(40_000, 8), 0.3) != 0).double(), kept)


def test_dropout_of_nothing_of_everything_and_outside_training_is_exact():
    x = torch.randn(5, 3)
    assert torch.equal(drop_out(x, 0.0), x)
    assert torch.equal(drop_out(x, 1.0), torch.zeros(5, 3))
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert not torch.equal(Dropout(0.5).train()(x), x)


def test_attention_written_out_is_torchs_own():
    queries, keys, values = torch.randn(3, 2, 4, 6, 8)
    mask = (torch.arange(6) < torch.tensor([[6], [3]]))[:, None, None]
    for where, causal in ((None, True), (mask, False), (None, False)):
        expected = F.scaled_dot_product_attention(queries, keys, values, where, is_causal=causal)
        found = _attend(queries, KeyValues(keys, values), where, causal, 0.0)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("way", ["forward", "first", "state_at"])
def test_dropout_falls_on_the_attention_weights_in_training(way):
    """The mean over many draws is the result without dropout, and single draws differ."""
    torch.manual_seed(0)
    attention, x = Attention(8, 2, 0.3), torch.randn(1, 4, 8).expand(20_000, -1, -1)
    ways = {
        "forward": lambda: attention(x, None, True)[0],
        "first": lambda: attention.first(x, None),
        "state_at": lambda: attention.state_at(x, torch.full((len(x),), 3))[0],
    }
    with torch.no_grad():
        noisy, exact = ways[way](), (attention.eval(), ways[way]())[1]
    assert len(noisy[:100].unique(dim=0)) > 50
    torch.testing.assert_close(noisy.mean(0), exact[0], atol=0.02, rtol=0)


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"dim=10 .* num_heads=4"):
        Transformer(10, 1, 4, 20, 0.0, "causal")
