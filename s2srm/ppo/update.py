"""Minibatch updates of policy and critic on one phase's experience.

    policy  sum over tokens of -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) / n
            - entropy_coef * mean entropy,      rho = pi(y_t) / pi_old(y_t),
            |log rho| bounded by max_log_ratio, without a gradient where that binds
    critic  vf_coef * clipped squared error (values.py) / n

n counts the tokens of the minibatch over all ranks and micro-batches. Policy and critic are
separate models with separate optimisers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2srm import distributed
from s2srm.config import PPOConfig
from s2srm.engine.base import Engine, StepInfo, run_microbatches
from s2srm.evidence import Seen
from s2srm.guards import Place, check_gradient, check_step
from s2srm.packing import Packed, Segment, pack, rows_of
from s2srm.ppo.experience import Experience, KeptForward
from s2srm.ppo.guarding import CRITIC_NUMBERS, POLICY_NUMBERS, update_place
from s2srm.ppo.metrics import TokenMeans
from s2srm.ppo.minibatches import Minibatch
from s2srm.ppo.values import value_loss
from s2srm.watchdog import pulse

RATIO_TOLERANCE = 1e-5
"""How far the first minibatch's ratio may be from 1 where logprobs are exact to float32."""
RATIO_TOLERANCE_BFLOAT16 = 1e-2
"""The same where the hidden states are bfloat16."""


@dataclass(frozen=True)
class _Microbatch:
    """One forward: a packed batch and the number of each of its rows in the experience.

    kept: the policy's forward, if there was one already.
    """

    batch: Packed
    rows: Tensor
    kept: KeptForward | None = None


def update(
    policy: Engine | None,
    critic: Engine | None,
    experience: Experience,
    plan: list[Minibatch],
    cfg: PPOConfig,
    means: TokenMeans,
    *,
    first_epoch: bool,
    phase: int = 1,
    epoch: int = 1,
) -> dict[str, float]:
    """One pass over a phase; all ranks must call it.

    Args:
        policy, critic: None where it does not learn in this pass.
        plan: the minibatches of this pass.
        means: takes in the losses and ratios of every micro-batch.
        first_epoch: the policy is still the one that `experience` was collected with; its ratio
            is then asserted to be 1.
        phase, epoch: counted from 1, for the error of numbers that are not finite.

    TrainingDiverged if a loss or gradient is not finite.

    Returns:
        Gradient norms (before clipping) and learning rates of the last step, and
        ppo/first_ratio_error if first_epoch.
    """
    found: dict[str, float] = {}
    segments = experience.rollouts.segments()
    for number, minibatch in enumerate(plan):
        microbatches = [
            _microbatch([segments[i] for i in group], group, experience, means.device)
            for group in minibatch.microbatches
        ]
        if policy is not None:
            is_first = first_epoch and number == 0
            if is_first and experience.kept is not None:
                microbatches[0] = replace(microbatches[0], kept=experience.kept)
            place = update_place("policy", cfg, phase, epoch, number + 1)
            info, ratio_error = _policy_step(
                policy, experience, microbatches, minibatch.num_tokens, cfg, means, is_first, place
            )
            if is_first:
                found["ppo/first_ratio_error"] = ratio_error
            found |= {"grad_norm/policy": info.grad_norm, "lr/policy": info.lr}
        if critic is not None:
            place = update_place("critic", cfg, phase, epoch, number + 1)
            info = _critic_step(
                critic, experience, microbatches, minibatch.num_tokens, cfg, means, place
            )
            found |= {"grad_norm/critic": info.grad_norm, "lr/critic": info.lr}
    return found


def _policy_step(
    policy: Engine,
    experience: Experience,
    microbatches: list[_Microbatch],
    num_tokens: int,
    cfg: PPOConfig,
    means: TokenMeans,
    is_first: bool,
    place: Place,
) -> tuple[StepInfo, float]:
    """Gradients of the minibatch, the ratio's check, the optimiser's step."""
    deviations: list[Tensor] = []
    seen: list[Seen] = []

    def loss_fn(microbatch: _Microbatch) -> Tensor:
        rows = microbatch.rows
        loss, ratio = policy.train_forward(
            microbatch.batch,
            "ppo_loss",
            hidden=None if microbatch.kept is None else microbatch.kept.take(),
            old_logprobs=experience.old_logprobs[rows],
            advantages=experience.advantages[rows],
            clip_low=cfg.clip_low,
            clip_high=cfg.clip_high,
            max_log_ratio=cfg.max_log_ratio or None,
            entropy_coef=cfg.entropy_coef,
            normalizer=float(num_tokens),
            temperature=cfg.sampling.temperature,
        )
        count = rows.numel()
        means.add("ppo/policy_loss", loss.detach() * num_tokens / count, count)
        means.add("ppo/clip_fraction", ratio.clip_fraction, count)
        means.add("ppo/bounded_fraction", ratio.bounded_fraction, count)
        means.add("ppo/entropy", ratio.entropy, count)
        means.add("ppo/ratio_mean", ratio.ratio_mean, count)
        means.add("ppo/update_kl", ratio.k3, count)
        means.largest("ppo/ratio_max", ratio.ratio_max)
        # Without a reference k3 is mean(rho^-1 - 1 + log rho), half the mean square of log rho.
        deviations.extend([(ratio.ratio_max - 1).abs(), (2 * ratio.k3.clamp_min(0)).sqrt()])
        numbers = {"loss": loss.detach(), "ratio": ratio.ratio_max, "KL": ratio.k3}
        learned = {"old_logprobs": experience.old_logprobs, "advantages": experience.advantages}
        seen.append(Seen(microbatch.batch, numbers, {k: v[rows] for k, v in learned.items()}))
        return loss

    pulse.phase(place.where)
    run_microbatches(policy, microbatches, loss_fn)
    check_step(seen, POLICY_NUMBERS, place, policy.device)
    error = 0.0
    if is_first:
        largest = float(torch.stack(deviations).max()) if deviations else 0.0
        error = max(distributed.gather_objects(largest))
        check_first_ratio(error, next(policy.module.parameters()).dtype)
    info = policy.step()
    check_gradient(info, place, seen)
    return info, error


def _critic_step(
    critic: Engine,
    experience: Experience,
    microbatches: list[_Microbatch],
    num_tokens: int,
    cfg: PPOConfig,
    means: TokenMeans,
    place: Place,
) -> StepInfo:
    """Gradients of the value loss over the minibatch, and the optimiser's step."""
    seen: list[Seen] = []

    def loss_fn(microbatch: _Microbatch) -> Tensor:
        rows = microbatch.rows
        values = critic.train_forward(microbatch.batch)[microbatch.batch.rows]
        loss = value_loss(
            values,
            experience.values[rows],
            experience.returns[rows],
            cfg.critic.clip,
            float(num_tokens),
        )
        count = rows.numel()
        means.add("ppo/value_loss", loss.detach() * num_tokens / count, count)
        learned = {"old_values": experience.values, "returns": experience.returns}
        rows_seen = {name: values[rows] for name, values in learned.items()}
        seen.append(Seen(microbatch.batch, {"loss": loss.detach()}, rows_seen))
        return cfg.vf_coef * loss

    pulse.phase(place.where)
    run_microbatches(critic, microbatches, loss_fn)
    check_step(seen, CRITIC_NUMBERS, place, critic.device)
    info = critic.step()
    check_gradient(info, place, seen)
    return info


def check_first_ratio(error: float, dtype: torch.dtype) -> None:
    """Before the first update the policy is the old policy: every ratio is 1.

    error: over all ranks and micro-batches, the largest of max ratio - 1 and the root mean square
    of the log ratio (which sees ratios below 1). Raises RuntimeError if it is not tiny: then old
    and new logprobs are not of the same tokens, weights, temperature or forward, and every update
    would be wrong.
    """
    tolerance = RATIO_TOLERANCE_BFLOAT16 if dtype == torch.bfloat16 else RATIO_TOLERANCE
    if not error <= tolerance:
        raise RuntimeError(
            f"the ratio of the first PPO minibatch is off 1 by {error:.3g} (limit {tolerance:g}): "
            "old logprobs do not come from the forward that is trained"
        )


def _microbatch(
    segments: list[Segment], group: list[int], experience: Experience, device: torch.device
) -> _Microbatch:
    rows = rows_of(experience.cu_rows, group).to(device)
    return _Microbatch(pack(segments).to(device), rows)
