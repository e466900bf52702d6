"""Where in PPO a number stops being finite, and what to change then: see `s2srm.guards`.

k3 is not looked at: it is logged only, and overflows where the gap to the reference exceeds 88 nat.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from s2srm.config import PPOConfig
from s2srm.guards import Place, Rows, check_rows
from s2srm.rewards.base import RewardBatch

if TYPE_CHECKING:
    from s2srm.ppo.experience import Experience

LOSSES = {"policy": "ppo/policy_loss", "critic": "ppo/value_loss"}


def update_place(
    model: Literal["policy", "critic"], cfg: PPOConfig, phase: int, epoch: int, minibatch: int
) -> Place:
    """A minibatch's step of one of the two models; everything is counted from 1."""
    where = f"PPO phase {phase}, epoch {epoch}, minibatch {minibatch}, {model}"
    return Place(where, phase, _learn_slower(model, cfg), LOSSES[model], f"grad_norm/{model}")


def trained_place(model: Literal["policy", "critic"], phase: int, cfg: PPOConfig) -> Place:
    """After the last update of a phase."""
    where = f"PPO, after phase {phase}, {model}"
    return Place(where, phase + 1, _learn_slower(model, cfg), LOSSES[model])


def check_reward(reward: RewardBatch, cfg: PPOConfig, phase: int) -> None:
    """The reward model's own numbers: it is frozen, so the training has no part in them."""
    path = cfg.reward.model.path
    remedy = f"it comes from reward.model.path {path}, in {cfg.reward.model.precision}"
    where = "PPO calibration" if phase == 0 else f"PPO phase {phase}"
    place = Place(where, phase, f"{remedy}: take another reward model or precision")
    check_rows([Rows("reward of a response", reward.raw_sum, "reward/sum_mean", place)])


def check_experience(experience: Experience, cfg: PPOConfig, phase: int) -> None:
    """What policy, reference and critic say of a phase's responses, before it is learned from."""

    def place(model: Literal["policy", "reference", "critic"]) -> Place:
        if phase > 1 and model != "reference":
            remedy = f"the updates of phase {phase - 1} did it: {_learn_slower(model, cfg)}"
        else:
            path = {"reference": cfg.reference, "critic": cfg.critic.path}.get(model)
            remedy = (
                f"no update has done it: look at {path or cfg.policy.path} in "
                f"{cfg.policy.precision}"
            )
        return Place(f"PPO phase {phase}, {model}", phase, remedy)

    own = experience.own_rows
    logprob = "logprob of a sampled token"
    check_rows(
        [
            Rows(logprob, experience.old_logprobs[own], "kl/k1", place("policy")),
            Rows(logprob, experience.k1[own], "kl/k1", place("reference")),
            Rows("value of a token", experience.values[own], "ppo/value_mean", place("critic")),
            Rows("return of a token", experience.returns[own], "ppo/value_mean", place("critic")),
        ]
    )


def _learn_slower(model: Literal["policy", "critic"], cfg: PPOConfig) -> str:
    key, optim = ("optim", cfg.optim) if model == "policy" else ("critic.optim", cfg.critic.optim)
    return f"lower {key}.lr ({optim.lr:g}) or raise {key}.warmup_steps"
