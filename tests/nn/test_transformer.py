"""The transformer's promises: causality, padding that changes nothing, and a cache that changes nothing."""

import pytest
import torch
from torch import nn

from recsys_lightning.nn.transformer import KeyValues, Transformer


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


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"dim=10 .* num_heads=4"):
        Transformer(10, 1, 4, 20, 0.0, "causal")
