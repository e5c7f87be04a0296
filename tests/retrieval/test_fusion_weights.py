"""Learned fusion weights: where they start, what they read, and that a file is they."""

import math

import pytest
import torch
from safetensors.torch import save_file

from recsys_lightning.errors import InputError
from recsys_lightning.retrieval.beam_fusion import Candidates
from recsys_lightning.retrieval.fusion_weights import FEATURES, FusionWeights, user_features


def candidates() -> Candidates:
    """Two users with two beams each: three candidates, then one."""
    row = torch.tensor([0, 0, 0, 1])
    return Candidates(row, torch.tensor([0, 0, 1, 2]), torch.tensor([4, 7, 9, 4]), torch.tensor([0.1, 0.6, -0.2, -0.5]))


def some_features(count: int = 5) -> torch.Tensor:
    return torch.randn(count, len(FEATURES), generator=torch.Generator().manual_seed(0))


def trained() -> FusionWeights:
    """Weights that differ from those they start with."""
    torch.manual_seed(0)
    weights = FusionWeights(0.8, 12.0, "per_id", 20, hidden=3)
    weights.standardize(some_features())
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return weights


def test_features_by_hand():
    log_probs = torch.tensor([[0.6, 0.2], [0.5, 0.5]]).log()
    found = user_features(log_probs, torch.tensor([7, 1]), candidates())
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))  # of the beams' shares 0.6 / 0.8 and 0.2 / 0.8
    expected = [[entropy, math.log(0.6), math.log(7), 0.6], [math.log(2), math.log(0.5), 0.0, -0.5]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_untrained_weights_are_the_fixed_pair_for_everybody():
    weights = FusionWeights(0.7, 24.0)
    weights.standardize(some_features())
    tau, psi = weights(1000 * some_features())
    torch.testing.assert_close(tau, torch.full((5,), 0.7))
    torch.testing.assert_close(psi, torch.full((5,), 24.0))


def test_weights_stay_above_zero():
    tau, psi = trained()(100 * some_features(50))
    for part in (tau, psi):
        assert (part >= 0).all()
        assert part.std() > 0


def test_features_are_taken_in_the_units_of_the_users_it_learned_from():
    weights, features = trained(), some_features()
    stretched = trained()
    stretched.standardize(features * 3 + 5)
    torch.testing.assert_close(stretched(features * 3 + 5), weights(features))


def test_a_feature_that_never_changes_does_no_harm():
    features = some_features()
    features[:, 1] = 2.5
    weights = trained()
    weights.standardize(features)
    assert all(bool(part.isfinite().all()) for part in weights(features))


def test_a_saved_file_is_the_weights(tmp_path):
    path = tmp_path / "deep" / "weights.safetensors"
    weights = trained()
    weights.save(path)
    again = FusionWeights.load(path)
    assert (again.mode, again.num_beams, again.hidden) == ("per_id", 20, 3)
    for one, other in zip(weights(some_features()), again(some_features()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    if content is None:
        save_file({"codes": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="holds no fusion weights"):
        FusionWeights.load(path)


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(InputError, match="recsys study learned-fusion"):
        FusionWeights.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("pair", [(0.0, 16.0), (1.0, -2.0), (float("nan"), 1.0)])
def test_a_fixed_pair_that_nothing_can_be_learned_from_is_refused(pair):
    with pytest.raises(InputError, match="must be above 0"):
        FusionWeights(*pair)
