"""Where in PPO a number stops being finite, and what to change then: see `s2srm.guards`.

k3 is not looked at: it is logged only, and overflows where the gap to the reference exceeds 88 nat.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from s2srm.config import PPOConfig
from s2srm.guards import Place, Rows, check_rows
from s2srm.packing import Segment, rows_of
from s2srm.rewards.base import RewardBatch, cumulative_lengths

if TYPE_CHECKING:
    from s2srm.ppo.experience import Experience

LOSSES = {"policy": "ppo/policy_loss", "critic": "ppo/value_loss"}
POLICY_NUMBERS = {"loss": LOSSES["policy"], "ratio": "ppo/ratio_max", "KL": "ppo/update_kl"}
CRITIC_NUMBERS = {"loss": LOSSES["critic"]}
"""What is looked at of every micro-batch of an update, with its name in metrics.jsonl."""


def update_place(
    model: Literal["policy", "critic"], cfg: PPOConfig, phase: int, epoch: int, minibatch: int
) -> Place:
    """A minibatch's step of one of the two models; everything is counted from 1."""
    where = f"PPO phase {phase}, epoch {epoch}, minibatch {minibatch}, {model}"
    remedy = _learn_slower(model, cfg)
    norm = f"grad_norm/{model}"
    return Place(where, phase, remedy, LOSSES[model], norm, run=Path(cfg.output))


def trained_place(model: Literal["policy", "critic"], phase: int, cfg: PPOConfig) -> Place:
    """After the last update of a phase."""
    where = f"PPO, after phase {phase}, {model}"
    return Place(where, phase + 1, _learn_slower(model, cfg), LOSSES[model])


def check_reward(
    reward: RewardBatch, responses: Sequence[Segment], cfg: PPOConfig, phase: int
) -> None:
    """The reward model's own numbers: it is frozen, so the training has no part in them.

    reward, responses: this rank's share, with prompts.
    """
    path = cfg.reward.model.path
    remedy = f"it comes from reward.model.path {path}, in {cfg.reward.model.precision}"
    where = "PPO calibration" if phase == 0 else f"PPO phase {phase}"
    remedy += ": take another reward model or precision"
    place = Place(where, phase, remedy, run=Path(cfg.output))
    column = Rows("reward of a response", reward.raw_sum, "reward/sum_mean", place)
    check_rows([column], responses)


def check_experience(experience: Experience, cfg: PPOConfig, phase: int) -> None:
    """What policy, reference and critic say of a phase's responses, before it is learned from."""

    def place(model: str) -> Place:
        if phase > 1 and (model == "policy" or model == "critic"):
            remedy = f"the updates of phase {phase - 1} did it: {_learn_slower(model, cfg)}"
        else:
            path = {"reference": cfg.reference, "critic": cfg.critic.path}.get(model)
            remedy = (
                f"no update has done it: look at {path or cfg.policy.path} in "
                f"{cfg.policy.precision}"
            )
        return Place(f"PPO phase {phase}, {model}", phase, remedy, run=Path(cfg.output))

    own, responses = experience.own, experience.rollouts.responses
    rows = rows_of(experience.cu_rows, own).to(experience.values.device)
    offsets = cumulative_lengths([responses[i] for i in own])
    segments = experience.rollouts.segments()
    logprob = "logprob of a sampled token"
    columns = (
        (logprob, experience.old_logprobs, "kl/k1", "policy"),
        (f"KL (by the {logprob})", experience.k1, "kl/k1", "reference"),
        ("value of a token", experience.values, "ppo/value_mean", "critic"),
        ("return of a token", experience.returns, "ppo/value_mean", "critic"),
    )
    check_rows(
        [
            Rows(what, values[rows], metric, place(model), offsets)
            for what, values, metric, model in columns
        ],
        [segments[i] for i in own],
    )


def _learn_slower(model: Literal["policy", "critic"], cfg: PPOConfig) -> str:
    key, optim = ("optim", cfg.optim) if model == "policy" else ("critic.optim", cfg.critic.optim)
    return f"lower {key}.lr ({optim.lr:g}) or raise {key}.warmup_steps"
