"""What a phase's responses are worth: logprobs, values, rewards, advantages.

Every rank scores what it learns from in the first epoch, and all ranks get all of it. Old logprobs
come from the training engine's forward over the very micro-batches of the first epoch, so that the
ratio of the first minibatch is 1. Where the engine can, the first of these forwards keeps its graph
and is the one that the first update goes back through. Logprobs of policy and reference are those
of logits / temperature, which is what was sampled from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2srm.config import PPOConfig
from s2srm.engine import Engine
from s2srm.ppo.kl import k1, k3
from s2srm.ppo.minibatches import Minibatch, Rollouts
from s2srm.ppo.scoring import Forwards
from s2srm.ppo.whitening import whiten
from s2srm.rewards.base import RewardBatch
from s2srm_kernels import gae


@dataclass(frozen=True)
class Experience:
    """One phase, of all ranks: B responses with N tokens, in the order of `rollouts`.

    reward        of the reward model, KL not subtracted
    old_logprobs  (N,) nats, of the policy that sampled
    k1, k3        (N,) nats, KL estimates between policy and reference
    values        (N,) of the critic before every token
    advantages    (N,) whitened if asked for
    returns       (N,) advantages before whitening + values: what the critic learns
    own           numbers of the responses that this rank has scored
    kept          the policy's forward over the first micro-batch, if it was kept
    """

    rollouts: Rollouts
    reward: RewardBatch
    cu_rows: Tensor
    old_logprobs: Tensor
    k1: Tensor
    k3: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    own: list[int]
    kept: KeptForward | None = None


class KeptForward:
    """Hidden states with their graph, for one backward."""

    def __init__(self, hidden: Tensor) -> None:
        self._hidden: Tensor | None = hidden

    def take(self) -> Tensor:
        """Once: then nothing here holds the graph."""
        hidden, self._hidden = self._hidden, None
        assert hidden is not None, "the forward was taken before"
        return hidden


def collect_experience(
    policy: Engine,
    reference: Engine,
    critic: Engine,
    rollouts: Rollouts,
    reward: RewardBatch,
    first_epoch: list[Minibatch],
    kl_coef: float,
    cfg: PPOConfig,
    *,
    keep_first: bool = False,
) -> Experience:
    """Score a phase's responses; all ranks must call it.

    Args:
        reward: of `rollouts`, in their order, the same on every rank.
        first_epoch: the plan of the first pass over the phase; it covers every response once.
        kl_coef: beta of r_t - beta * k1_t.
        keep_first: the policy's update follows, before anything changes its weights.
    """
    forwards = Forwards(rollouts, first_epoch, policy.device)
    temperature = cfg.sampling.temperature
    values, last_values = forwards.values(critic)
    ref_logprobs = forwards.logprobs(reference, temperature)
    kept: list[KeptForward] = []
    keep = (lambda hidden: kept.append(KeptForward(hidden))) if keep_first else None
    # Last: what is kept takes the memory of a micro-batch in training.
    old_logprobs = forwards.logprobs(policy, temperature, keep if policy.keeps_graphs else None)
    finished = torch.tensor(
        [r.finished for r in rollouts.responses], dtype=torch.bool, device=policy.device
    )
    kl = k1(old_logprobs, ref_logprobs)
    advantages, returns = advantages_and_returns(
        reward, kl.to(values.dtype), kl_coef, values, last_values, finished, cfg.gamma, cfg.lam
    )
    return Experience(
        rollouts=rollouts,
        reward=reward,
        cu_rows=reward.cu_rows,
        old_logprobs=old_logprobs,
        k1=kl,
        k3=k3(old_logprobs, ref_logprobs),
        values=values,
        advantages=whiten(advantages) if cfg.whiten_advantages else advantages,
        returns=returns,
        own=forwards.shares.mine,
        kept=kept[0] if kept else None,
    )


def advantages_and_returns(
    reward: RewardBatch,
    kl: Tensor,
    kl_coef: float,
    values: Tensor,
    last_values: Tensor,
    finished: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """GAE of r_t - beta * kl_t, the rewards already clipped.

    Past the end of a finished response there is nothing: bootstrap 0. A truncated one would have
    gone on: it bootstraps from the critic's value after its last token.

    Args:
        kl, values: (N,).
        last_values: (B,), the critic's value after the last token.
        finished: (B,) bool.

    Returns:
        (advantages (N,), returns (N,)).
    """
    if values.numel() == 0:
        return values, values
    advantages, returns = gae(
        reward.rewards.to(values.dtype) - kl_coef * kl,
        values,
        reward.cu_rows,
        gamma=gamma,
        lam=lam,
        bootstrap=torch.where(finished, torch.zeros_like(last_values), last_values),
    )
    return advantages, returns
