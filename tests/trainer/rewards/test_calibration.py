"""The unit that makes KL coefficients comparable."""

import pytest
import torch

from s2srm.errors import UserError
from s2srm.rewards.calibration import unit_std_scale


def test_scaled_sums_have_unit_standard_deviation_and_keep_their_mean_relative():
    sums = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 7 + 100
    scaled = sums.double() * unit_std_scale(sums)
    assert scaled.std(unbiased=False).item() == pytest.approx(1.0, rel=1e-6)
    assert scaled.mean().item() == pytest.approx(100 / 7, rel=0.1)


def test_large_mean_does_not_eat_the_variance():
    sums = torch.tensor([1e6 - 1, 1e6 + 1, 1e6 - 1, 1e6 + 1], dtype=torch.float32)
    assert unit_std_scale(sums) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
def test_constant_reward_is_explained(value):
    with pytest.raises(UserError, match=r"all 5 responses .* reward sum .* does not tell them"):
        unit_std_scale(torch.full((5,), value))


def test_nan_reward_is_an_error_not_a_scale():
    with pytest.raises(UserError):
        unit_std_scale(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_responses(count):
    with pytest.raises(UserError, match=rf"at least 2 .* got {count}"):
        unit_std_scale(torch.ones(count))
