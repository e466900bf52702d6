"""The policy on prompts that it is not trained on.

The same prompts with the same seeds each time, so that two evaluations differ by the policy alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from s2srm import distributed
from s2srm.config import PPOConfig
from s2srm.ppo.kl import k1
from s2srm.ppo.minibatches import plan_epoch
from s2srm.ppo.sampler import Sampler
from s2srm.ppo.scoring import Forwards, score
from s2srm.ppo.setup import Models
from s2srm.rewards.base import sequence_sums
from s2srm.watchdog import pulse


def is_due(done: int, cfg: PPOConfig) -> bool:
    """After `done` phases: before the first, every eval_every, and after the last."""
    every = cfg.eval_every > 0 and done % cfg.eval_every == 0
    return cfg.eval_data is not None and (done in (0, cfg.total_steps) or every)


def evaluate(
    done: int, models: Models, sampler: Sampler, prompts: Sequence[list[int]], cfg: PPOConfig
) -> dict[str, float]:
    """Means over a response to each of the prompts; all ranks must call it.

    eval/reward/sum_mean              of the scaled, clipped rewards' sum, no KL
    eval/reward/raw_sum_mean          the same in the reward model's own units
    eval/kl/per_response              of the sum of log policy - log reference, at the temperature
                                      of training; an estimate of the KL unless sampled otherwise
    eval/kl/k1                        the same per token
    eval/response/length_mean         in tokens
    eval/response/truncated_fraction  of the responses
    """
    pulse.phase(f"PPO evaluation after phase {done}")
    rollouts = sampler.held_out(prompts)
    reward = score(models.reward, rollouts, cfg, done)
    count = len(rollouts.responses)
    plan = plan_epoch(
        rollouts, range(count), count, cfg.microbatch_tokens, distributed.world_size()
    )
    forwards = Forwards(rollouts, plan, models.policy.device)
    policy, reference = (
        forwards.logprobs(engine, cfg.sampling.temperature)
        for engine in (models.policy, models.reference)
    )
    kl = sequence_sums(k1(policy, reference).double(), reward.cu_rows)
    num_tokens = sum(len(response.tokens) for response in rollouts.responses)
    found = {
        "reward/sum_mean": float(reward.sequence_sum.double().mean()),
        "reward/raw_sum_mean": float(reward.raw_sum.double().mean()),
        "kl/per_response": float(kl.mean()),
        "kl/k1": float(kl.sum()) / num_tokens,
        "response/length_mean": num_tokens / count,
        "response/truncated_fraction": sum(not r.finished for r in rollouts.responses) / count,
    }
    return {f"eval/{name}": value for name, value in found.items()}
