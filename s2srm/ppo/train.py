"""PPO on the reward of a seq2seq or a scalar reward model.

A phase: sample responses, score them, subtract the KL to the reference, estimate advantages, and
take ppo_epochs passes of minibatch steps with policy and critic. Left out: pretraining mix-in,
value-function sharing, early stopping inside a phase.
"""

from __future__ import annotations

import time
from functools import partial

from s2srm import distributed
from s2srm.checkpoint.best import BestModel
from s2srm.checkpoint.saver import Checkpoints
from s2srm.config import PPOConfig
from s2srm.engine import Engine
from s2srm.errors import UserError
from s2srm.guards import check_trained
from s2srm.metrics import RunLogger
from s2srm.outputs import writing
from s2srm.ppo.experience import Experience, collect_experience
from s2srm.ppo.guarding import check_experience, trained_place
from s2srm.ppo.held_out import evaluate, is_due
from s2srm.ppo.kl import KLController
from s2srm.ppo.metrics import TokenMeans, phase_metrics
from s2srm.ppo.minibatches import (
    Minibatch,
    Rollouts,
    balance_metrics,
    permutation,
    plan_epoch,
)
from s2srm.ppo.sampler import Sampler
from s2srm.ppo.samples import sample_rows
from s2srm.ppo.scoring import score
from s2srm.ppo.setup import Inputs, Models, load_models, prepare
from s2srm.ppo.update import update
from s2srm.rewards.calibration import RewardScale, unit_std_scale
from s2srm.runs import RunResult, finish_run
from s2srm.validation import validate
from s2srm.watchdog import pulse
from s2srm.watchdog.watch import watching


def run(cfg: PPOConfig) -> RunResult:
    """Train; writes metrics.jsonl, samples.jsonl, the policy, and the critic under critic/."""
    cfg = validate(cfg)
    with watching(cfg.watchdog, cfg.output):
        return train(cfg, prepare(cfg))


def train(cfg: PPOConfig, inputs: Inputs) -> RunResult:
    """All of a run that needs weights."""
    if inputs.start.finished is not None:
        return inputs.start.finished
    output, total = inputs.start.output, cfg.total_steps
    models = load_models(cfg, inputs)
    sampler = Sampler(models.policy, inputs.prompts, inputs.template.eos_id, cfg)
    controller, scale = KLController(cfg.kl), RewardScale(models.reward)
    with (
        RunLogger(output, cfg.log, total, f"PPO ({cfg.reward.kind})") as logger,
        Checkpoints(
            cfg,
            output,
            {"policy": models.policy, "critic": models.critic},
            {"kl": controller, "reward_scale": scale, "log": logger},
            total,
            inputs.prompts,
        ) as saved,
    ):
        done = saved.resume(inputs.start)
        best = BestModel(
            cfg.keep_best,
            output,
            partial(models.policy.save, tokenizer=inputs.tokenizer, template=inputs.template),
        )
        if done == 0:
            scale.set(calibrate(models, sampler, cfg))
            if is_due(0, cfg):
                found = evaluate(0, models, sampler, inputs.held_out, cfg)
                logger.row(0, found)
                best.after_evaluation(0, found)
        for phase in range(done, total):
            metrics = run_phase(phase, models, sampler, controller, inputs, cfg, logger)
            metrics["reward/scale"] = scale.value
            if is_due(phase + 1, cfg):
                check_models(models, phase + 1, cfg)
                metrics |= evaluate(phase + 1, models, sampler, inputs.held_out, cfg)
            logger.row(phase + 1, metrics)
            best.after_evaluation(phase + 1, metrics)
            logger.advance(
                tokens=int(metrics["response/tokens"]),
                reward=metrics["reward/sum_mean"],
                kl=metrics["kl/per_response"],
                length=metrics["response/length_mean"],
            )
            pulse.settle()
            saved.after_step(phase + 1, partial(check_models, models, phase + 1, cfg))
        check_models(models, total, cfg)
        pulse.phase("saving policy and critic")
        with writing(output):
            models.policy.save(output, inputs.tokenizer, inputs.template)
            models.critic.save(output / "critic", inputs.tokenizer, inputs.template)
            distributed.barrier()
            return finish_run(output, cfg, dict(logger.last))


def check_models(models: Models, phase: int, cfg: PPOConfig) -> None:
    """Before policy and critic are saved."""
    check_trained(models.policy, trained_place("policy", phase, cfg))
    check_trained(models.critic, trained_place("critic", phase, cfg))


def calibrate(models: Models, sampler: Sampler, cfg: PPOConfig) -> float:
    """Scale the reward to unit standard deviation over responses of the initial policy."""
    scale = 1.0
    if cfg.reward.scale == "unit_std":
        pulse.phase("PPO calibration")
        models.only(models.policy)
        rollouts = sampler.calibration()
        models.only(models.reward.engine)
        reward = score(models.reward, rollouts, cfg, 0)
        check_different(rollouts, len(sampler.prompts))
        scale = unit_std_scale(reward.raw_sum)
        models.reward.calibrate(scale)
    return scale


def check_different(rollouts: Rollouts, num_prompts: int) -> None:
    """UserError if all responses to a few prompts are the same: no reward has a spread then."""
    if len({tuple(response.tokens) for response in rollouts.responses}) == 1:
        raise UserError(
            f"reward.scale unit_std: the initial policy always writes the same response (to "
            f"{num_prompts} prompt{'s' if num_prompts > 1 else ''}), so its reward has no spread "
            "to scale by; give more prompts or a policy that varies, or take reward.scale none"
        )


def run_phase(
    phase: int,
    models: Models,
    sampler: Sampler,
    controller: KLController,
    inputs: Inputs,
    cfg: PPOConfig,
    logger: RunLogger | None = None,
) -> dict[str, float]:
    """One phase of PPO; returns its metrics, the same on every rank."""
    started = time.perf_counter()
    name = f"PPO phase {phase + 1}"
    pulse.phase(f"{name}, rollout")
    models.only(models.policy)
    rollouts = sampler.phase(phase)
    sampled = time.perf_counter()

    pulse.phase(f"{name}, reward")
    models.only(models.reward.engine)
    reward = score(models.reward, rollouts, cfg, phase + 1)
    pulse.phase(f"{name}, experience")
    models.only()
    first_epoch = epoch_plan(rollouts, phase, 0, cfg)
    coef = controller.coef
    experience = collect_experience(
        *(models.policy, models.reference, models.critic, rollouts, reward, first_epoch, coef, cfg),
        keep_first=phase >= cfg.critic_warmup_steps,
    )
    check_experience(experience, cfg, phase + 1)
    metrics = phase_metrics(experience) | {"kl/coef": coef}
    controller.update(metrics["kl/per_response"], cfg.rollout_size)
    pulse.phase(f"{name}, samples")
    if logger is not None and is_sample_phase(phase, cfg):
        logger.samples(phase + 1, sample_rows(experience, models.reward, inputs.tokenizer))
    scored = time.perf_counter()

    metrics |= learn(phase, models, experience, first_epoch, cfg)
    ended = time.perf_counter()
    return metrics | {
        "time/rollout_s": sampled - started,
        "time/reward_s": scored - sampled,
        "time/update_s": ended - scored,
        "time/tokens_per_s": metrics["response/tokens"] / (ended - started),
    }


def learn(
    phase: int, models: Models, experience: Experience, first_epoch: list[Minibatch], cfg: PPOConfig
) -> dict[str, float]:
    """ppo_epochs passes over the phase, each in another order: by the policy, then by the critic.

    One does not read what the other writes, and so only one of them needs its optimiser at a time.
    """
    means = TokenMeans(models.critic.device)
    found: dict[str, float] = {}
    rest = range(1, cfg.ppo_epochs)
    plans = [first_epoch, *(epoch_plan(experience.rollouts, phase, e, cfg) for e in rest)]
    learners: list[tuple[Engine | None, Engine | None]] = [(None, models.critic)]
    if phase >= cfg.critic_warmup_steps:
        learners.insert(0, (models.policy, None))
    for policy, critic in learners:
        models.only(policy or models.critic)
        for epoch, plan in enumerate(plans):
            found |= update(
                policy,
                critic,
                experience,
                plan,
                cfg,
                means,
                first_epoch=epoch == 0,
                phase=phase + 1,
                epoch=epoch + 1,
            )
    return found | means.reduce() | balance_metrics([m for plan in plans for m in plan])


def epoch_plan(rollouts: Rollouts, phase: int, epoch: int, cfg: PPOConfig) -> list[Minibatch]:
    """The minibatches of one pass over a phase, from the seed that all ranks share."""
    order = permutation(cfg.rollout_size, cfg.seed, phase, epoch)
    return plan_epoch(
        rollouts, order, cfg.minibatch_size, cfg.microbatch_tokens, distributed.world_size()
    )


def is_sample_phase(phase: int, cfg: PPOConfig) -> bool:
    """Every samples_every phases, the first and the last."""
    return phase % cfg.samples_every == 0 or phase == cfg.total_steps - 1
