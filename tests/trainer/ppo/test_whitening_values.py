"""Whitening, the clipped value loss, explained variance."""

import pytest
import torch

from s2srm.ppo.values import explained_variance, value_loss
from s2srm.ppo.whitening import moments, whiten


def test_whitened_values_have_mean_zero_and_variance_one():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3 + 50
    white = whiten(values)
    assert white.mean().abs() < 1e-5
    assert white.var(unbiased=False).item() == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(white.argsort(), values.argsort())


def test_constant_and_empty_inputs_do_not_become_nan():
    assert whiten(torch.full((4,), 3.0)).tolist() == [0.0] * 4
    assert whiten(torch.empty(0)).shape == (0,)
    assert [float(moment) for moment in moments(torch.empty(0))] == [0.0, 0.0]


def test_large_mean_does_not_eat_the_variance():
    _, variance = moments(torch.tensor([1e7 - 1, 1e7 + 1], dtype=torch.float32))
    assert float(variance) == pytest.approx(1.0, rel=1e-6)


def test_value_loss_takes_the_larger_of_clipped_and_unclipped_error():
    old, returns = torch.zeros(5), torch.tensor([1.0, 1.0, -1.0, 0.1, 1.0])
    values = torch.tensor([0.5, 1.5, 0.1, 0.1, -0.5], requires_grad=True)
    loss = value_loss(values, old, returns, clip=0.2, normalizer=8.0)
    # Twice past the clip towards R: (0.2 - 1)^2; inside the clip: v itself; at R: 0; past the clip
    # away from R: v itself, so that it is pulled back.
    expected = 0.5 * (0.64 + 0.64 + 1.21 + 0.0 + 2.25) / 8.0
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert values.grad is not None
    # Where the clipped term binds there is no gradient: the value has moved far enough.
    assert values.grad.tolist() == pytest.approx([0.0, 0.0, 1.1 / 8, 0.0, -1.5 / 8])


def test_value_loss_without_clipping_is_half_the_squared_error():
    values, returns = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])
    assert value_loss(values, torch.zeros(2), returns, 0.0, 2.0).item() == pytest.approx(2.0)


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns, returns) == pytest.approx(1.0)
    assert explained_variance(returns + 10, returns) == pytest.approx(1.0), "a shift is no variance"
    assert explained_variance(torch.zeros(4), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(4)) == 0.0
