"""What a phase logs: means over all its tokens and responses, never means of ranks' means.

`kl/k1` and `kl/k3` are per token, `kl/per_response` is the sum of k1 over a response, which the
adaptive controller steers; `ppo/update_kl` is k3 between the policy in training and the one that
sampled. `ppo/bounded_fraction` is the share of tokens whose log ratio max_log_ratio bounds: but for
0 it says that the policy has left its old self, or that a logprob is broken.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from s2srm import distributed
from s2srm.correlation import correlation, joint_moments
from s2srm.ppo.experience import Experience
from s2srm.ppo.values import explained_variance
from s2srm.ppo.whitening import moments
from s2srm.rewards.base import sequence_sums

logger = logging.getLogger(__name__)

MEANS = (
    "ppo/policy_loss",
    "ppo/clip_fraction",
    "ppo/bounded_fraction",
    "ppo/entropy",
    "ppo/ratio_mean",
    "ppo/update_kl",
    "ppo/value_loss",
)
LARGEST = ("ppo/ratio_max",)


class TokenMeans:
    """Token-weighted means, and maxima, of what micro-batches report; stays on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums = torch.zeros(len(MEANS), dtype=torch.float64, device=device)
        self._weights = torch.zeros(len(MEANS), dtype=torch.float64, device=device)
        self._largest = torch.full((len(LARGEST),), -math.inf, device=device)

    def add(self, name: str, value: Tensor, count: int) -> None:
        """A mean over `count` tokens."""
        self._sums[MEANS.index(name)] += value.double() * count
        self._weights[MEANS.index(name)] += count

    def largest(self, name: str, value: Tensor) -> None:
        """A maximum over some tokens."""
        i = LARGEST.index(name)
        self._largest[i] = torch.maximum(self._largest[i], value.float())

    def reduce(self) -> dict[str, float]:
        """Over all ranks; names that no rank has reported are left out."""
        sums, weights = distributed.sum_over_ranks(
            torch.stack([self._sums, self._weights])
        ).tolist()
        means = {
            name: total / weight
            for name, total, weight in zip(MEANS, sums, weights, strict=True)
            if weight > 0
        }
        by_rank = distributed.gather_objects(self._largest.tolist())
        largest = {name: max(row[i] for row in by_rank) for i, name in enumerate(LARGEST)}
        return means | {name: value for name, value in largest.items() if value > -math.inf}


def phase_metrics(experience: Experience) -> dict[str, float]:
    """Of one phase, before its updates.

    reward/sum_mean             mean over responses of the scaled, clipped rewards' sum, no KL
    reward/raw_sum_mean         the same in the reward model's own units
    reward/per_token_mean       scaled rewards, mean over tokens
    reward/divergence_fraction  mean over responses of divergence index / length (seq2seq only)
    reward/rm_agreement         share of tokens that are the RM's own (teacher-forced only)
    reward/length_correlation   Pearson, of raw sum and length; 0 where either is constant
    kl/k1, kl/k3                mean over tokens; kl/per_response: mean over responses of sum k1
    """
    reward, cu_rows = experience.reward, experience.cu_rows
    responses = experience.rollouts.responses
    table: dict[str, list[float]] = {
        "length": [float(len(r.tokens)) for r in responses],
        "truncated": [float(not r.finished) for r in responses],
        "sum": reward.sequence_sum.tolist(),
        "raw_sum": reward.raw_sum.tolist(),
        "k1": sequence_sums(experience.k1.double(), cu_rows).tolist(),
        "k3": sequence_sums(experience.k3.double(), cu_rows).tolist(),
    }
    if reward.divergence_index is not None:
        table["divergence"] = reward.divergence_index.double().tolist()
    if reward.rm_tokens is not None:
        tokens = torch.tensor([t for r in responses for t in r.tokens], dtype=torch.int64)
        agrees = (reward.rm_tokens == tokens.to(reward.rm_tokens.device)).double()
        table["agrees"] = sequence_sums(agrees, cu_rows).tolist()
    num_responses, num_tokens = len(table["length"]), sum(table["length"])
    mean_value, _ = moments(experience.values)
    metrics = {
        "reward/sum_mean": sum(table["sum"]) / num_responses,
        "reward/per_token_mean": sum(table["sum"]) / num_tokens,
        "reward/raw_sum_mean": sum(table["raw_sum"]) / num_responses,
        "reward/length_correlation": length_correlation(table),
        "kl/k1": sum(table["k1"]) / num_tokens,
        "kl/k3": sum(table["k3"]) / num_tokens,
        "kl/per_response": sum(table["k1"]) / num_responses,
        "response/length_mean": num_tokens / num_responses,
        "response/truncated_fraction": sum(table["truncated"]) / num_responses,
        "response/tokens": num_tokens,
        "ppo/value_mean": float(mean_value),
        "ppo/explained_variance": explained_variance(experience.values, experience.returns),
    }
    if "divergence" in table:
        fractions = [d / n for d, n in zip(table["divergence"], table["length"], strict=True)]
        metrics["reward/divergence_fraction"] = sum(fractions) / num_responses
    if "agrees" in table:
        metrics["reward/rm_agreement"] = sum(table["agrees"]) / num_tokens
    _warn_of_negative_kl(experience.k1)
    return metrics


def _warn_of_negative_kl(k1: Tensor) -> None:
    """k1 averages to the KL, so a mean below 0 by more than noise means that something disagrees.

    Sampling and logprobs then differ (temperature, suppressed tokens), and the policy is paid for
    leaving the reference. Noise: three standard errors of the mean.
    """
    mean, variance = moments(k1)
    error = math.sqrt(float(variance) / max(k1.numel(), 1))
    if float(mean) < -3.0 * error and distributed.is_main():
        logger.warning(
            "the mean KL estimate k1 is negative: %.3g +- %.2g nat per token", float(mean), error
        )


def length_correlation(table: Mapping[str, Sequence[float]]) -> float:
    """Pearson's, of a response's raw reward with its length; 0 where one of them is constant."""
    columns = (torch.tensor(table[name], dtype=torch.float64) for name in ("raw_sum", "length"))
    # Centred, because squares of large means would hide what varies.
    return correlation(joint_moments(*(column - column.mean() for column in columns)).tolist())
