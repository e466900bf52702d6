"""What a phase logs: the formulas, and means that weigh every token the same."""

from __future__ import annotations

import pytest
import torch

from s2srm.ppo.experience import Experience
from s2srm.ppo.metrics import TokenMeans, length_correlation, phase_metrics
from s2srm.ppo.minibatches import Rollouts
from s2srm.rewards.base import RewardBatch
from s2srm.rollout.base import Response


def experience(with_rm_tokens: bool = True) -> Experience:
    rollouts = Rollouts([[5], [6]], [Response([7, 2], True), Response([8, 9, 10, 11], False)])
    cu_rows = torch.tensor([0, 2, 6], dtype=torch.int32)
    rewards = torch.tensor([0.5, 0.5, 0.5, -0.5, -0.5, 0.0])
    sums = torch.tensor([1.0, -0.5])
    reward = RewardBatch(
        rewards,
        cu_rows,
        sums,
        2 * sums,
        torch.tensor([2, 1]) if with_rm_tokens else None,
        torch.tensor([7, 2, 8, 1, 1, 11]) if with_rm_tokens else None,
    )
    k1 = torch.tensor([0.1, 0.3, 0.0, 0.0, 0.2, 0.0])
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    tensors = (k1, k1, k1**2, values, values, values + 1.0)
    return Experience(rollouts, reward, cu_rows, *tensors, torch.arange(6))


def test_means_over_responses_and_over_tokens():
    found = phase_metrics(experience())
    expected = {
        "reward/sum_mean": 0.25,
        "reward/raw_sum_mean": 0.5,
        "reward/per_token_mean": 0.5 / 6,
        "reward/divergence_fraction": (2 / 2 + 1 / 4) / 2,
        "reward/rm_agreement": 4 / 6,
        "reward/length_correlation": -1.0,
        "kl/k1": 0.6 / 6,
        "kl/k3": 0.14 / 6,
        "kl/per_response": 0.3,
        "response/length_mean": 3.0,
        "response/truncated_fraction": 0.5,
        "response/tokens": 6.0,
        "ppo/value_mean": 2.5,
        "ppo/explained_variance": 1.0,
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_scalar_reward_has_no_divergence():
    found = phase_metrics(experience(with_rm_tokens=False))
    assert not {"reward/divergence_fraction", "reward/rm_agreement"} & found.keys()


def test_token_means_weigh_tokens_not_micro_batches():
    means = TokenMeans(torch.device("cpu"))
    means.add("ppo/entropy", torch.tensor(1.0), 30)
    means.add("ppo/entropy", torch.tensor(5.0), 10)
    means.largest("ppo/ratio_max", torch.tensor(1.1))
    means.largest("ppo/ratio_max", torch.tensor(0.9))
    assert means.reduce() == pytest.approx({"ppo/entropy": 2.0, "ppo/ratio_max": 1.1})
    assert TokenMeans(torch.device("cpu")).reduce() == {}


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.0, 2.0, 4.0, 3.0], 0.8),
        ([1e8 + 1.0, 1e8 + 2.0, 1e8 + 4.0, 1e8 + 3.0], 0.8),  # squares would swallow these
        ([2.0, 2.0, 2.0, 2.0], 0.0),
    ],
)
def test_correlation_of_reward_and_length(rewards, expected):
    found = length_correlation({"raw_sum": rewards, "length": [10.0, 20.0, 30.0, 40.0]})
    assert found == pytest.approx(expected)
