"""KL estimators and controllers."""

import math

import pytest
import torch

from s2srm.config import KLConfig
from s2srm.ppo.kl import KLController, k1, k3


def test_both_estimators_average_to_the_kl():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, dtype=torch.float64, generator=generator)
    policy, reference = logits.log_softmax(-1)
    exact = float((policy.exp() * (policy - reference)).sum())
    weights = policy.exp()
    assert float((weights * k1(policy, reference)).sum()) == pytest.approx(exact, rel=1e-12)
    assert float((weights * k3(policy, reference)).sum()) == pytest.approx(exact, rel=1e-12)


def test_k3_is_never_negative_and_zero_where_the_policies_agree():
    generator = torch.Generator().manual_seed(1)
    logprobs = -20 * torch.rand(5000, generator=generator)
    nearly = logprobs + 1e-6 * torch.randn(5000, generator=generator)
    far = -20 * torch.rand(5000, generator=generator)
    assert (k3(logprobs, nearly) >= 0).all() and (k3(logprobs, far) >= 0).all()
    assert (k1(logprobs, far) < 0).any(), "k1 has both signs"
    assert k3(logprobs, logprobs).abs().max() == 0


def test_k3_of_a_token_that_the_policy_left_is_finite():
    found = k3(torch.tensor([-100.0, -1.0]), torch.tensor([-1.0, -100.0]))
    assert found.isfinite().all() and found[0] > 1e42


def test_fixed_controller_stays():
    controller = KLController(KLConfig(coef=0.3))
    controller.update(1e6, 1000)
    assert controller.coef == 0.3


def test_adaptive_controller_moves_towards_the_target_and_stops_there():
    def updated(kl, num=1000):
        controller = KLController(KLConfig(0.1, "adaptive", target=6.0, horizon=10000))
        controller.update(kl, num)
        return controller.coef

    assert updated(6.0) == pytest.approx(0.1)
    assert updated(6.6) == pytest.approx(0.1 * math.exp(0.1 * 0.1))
    assert updated(12.0) == updated(1e9) == pytest.approx(0.1 * math.exp(0.1))
    assert updated(0.0) == updated(-5.0) == pytest.approx(0.1 * math.exp(-0.1))
    assert updated(1e9, 10000) == pytest.approx(0.1 * math.e), "horizon: a factor e at full error"


def test_state_round_trip():
    cfg = KLConfig(0.1, "adaptive")
    controller, other = KLController(cfg), KLController(cfg)
    controller.update(50.0, 64)
    other.load_state_dict(controller.state_dict())
    controller.update(1.0, 64)
    other.update(1.0, 64)
    assert other.coef == controller.coef != 0.1


def test_bad_target():
    with pytest.raises(ValueError, match=r"kl\.target"):
        KLController(KLConfig(controller="adaptive", target=0.0))
