"""Reliability and calibration error, by hand and against scikit-learn."""

import pytest
import torch
from sklearn.calibration import calibration_curve

from recsys_lightning.metrics.calibration import reliability


def test_bins_and_error_by_hand():
    """Two bins of two: (0.1, 0.3) with one hit, (0.5, 0.9) with two."""
    claimed, correct = torch.tensor([0.9, 0.1, 0.3, 0.5]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    found = reliability(claimed, correct, num_bins=2)
    assert found.cases.tolist() == [2, 2]
    assert found.claimed.tolist() == pytest.approx([0.2, 0.7])
    assert found.observed.tolist() == pytest.approx([0.5, 1.0])
    assert found.error() == pytest.approx((2 * 0.3 + 2 * 0.3) / 4)


def test_bins_are_scikit_learns_quantile_bins():
    g = torch.Generator().manual_seed(0)
    claimed = torch.rand(150, generator=g, dtype=torch.float64) ** 4
    correct = (torch.rand(150, generator=g) < claimed).double()
    observed, mean = calibration_curve(correct.numpy(), claimed.numpy(), n_bins=15, strategy="quantile")
    found = reliability(claimed, correct, 15)
    assert found.cases.tolist() == [10] * 15
    assert found.claimed.tolist() == pytest.approx(mean.tolist())
    assert found.observed.tolist() == pytest.approx(observed.tolist())


def test_equal_claims_share_a_bin_so_order_does_not_matter():
    claimed = torch.tensor([0.2] * 6 + [0.7] * 2)
    correct = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    found = reliability(claimed, correct, 4)
    assert found.cases.tolist() == [6, 2]
    assert found.error() == pytest.approx((6 * 0.3 + 2 * 0.3) / 8)
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    again = reliability(claimed[shuffled], correct[shuffled], 4)
    assert [part.tolist() for part in again] == [part.tolist() for part in found]


def test_no_bin_is_empty_with_fewer_cases_than_bins():
    found = reliability(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([True, False, True]), 15)
    assert found.cases.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("claimed", "correct", "bins"), [([], [], 2), ([0.5], [1.0, 0.0], 2), ([0.5], [1.0], 0), ([1.5], [1.0], 2)]
)
def test_what_cannot_be_binned_is_refused(claimed, correct, bins):
    with pytest.raises(ValueError, match=r"claimed"):
        reliability(torch.tensor(claimed), torch.tensor(correct), bins)


def test_nan_is_no_chance():
    with pytest.raises(ValueError, match=r"0\.\.1"):
        reliability(torch.tensor([0.5, float("nan")]), torch.tensor([1.0, 0.0]))
