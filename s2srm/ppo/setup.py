"""Everything of PPO before the first phase: inputs checked without weights, then models loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from s2srm import distributed
from s2srm.checkpoint.start import Start, start_run
from s2srm.config import DataConfig, ModelConfig, PPOConfig
from s2srm.data.compat import check_same_tokenizer
from s2srm.data.examples import tokenise_prompts
from s2srm.data.loading import load_prompts, log_rows
from s2srm.data.templates import Template
from s2srm.engine import Engine, build_engine
from s2srm.engine.build import engine_kind
from s2srm.errors import UserError
from s2srm.models.load import load_causal_lm, load_config, load_tokenizer, load_value_model
from s2srm.models.positions import position_limit
from s2srm.models.value import SCORE_FILE
from s2srm.models.vocabulary import check_vocabularies
from s2srm.rewards.base import RewardModel
from s2srm.rewards.scalar import ScalarReward
from s2srm.rewards.seq2seq import Seq2SeqReward
from s2srm.watchdog import pulse


@dataclass(frozen=True)
class Inputs:
    """What a run reads before any weight: its start, tokenizer, template, prompts as ids, and those
    of eval_data."""

    start: Start
    tokenizer: PreTrainedTokenizerBase
    template: Template
    prompts: list[list[int]]
    held_out: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Models:
    """The four models of PPO; reference and reward are frozen."""

    policy: Engine
    reference: Engine
    critic: Engine
    reward: RewardModel

    def only(self, *busy: Engine | None) -> None:
        """Where engine.offload is idle: the other models, and all optimisers, wait in host memory.

        An optimiser comes back at its model's next backward, a model at its next forward.
        """
        for engine in (self.policy, self.reference, self.critic, self.reward.engine):
            if engine is not None:
                engine.sleep(weights=engine not in busy)


def prepare(cfg: PPOConfig) -> Inputs:
    """Check and read everything but the weights. UserError for whatever does not fit together."""
    pulse.phase("reading settings and data")
    distributed.start()
    engine_kind(cfg.engine)
    config = load_config(cfg.policy, "policy.path")
    rm_config = load_config(cfg.reward.model, "reward.model.path")
    tokenizer = load_tokenizer(cfg.policy, "policy.path")
    template = Template.build(tokenizer, cfg.template)
    _check_reward_model(cfg, tokenizer, template)
    started = {"reference": cfg.reference, "critic.path": cfg.critic.path}
    configs: dict[str, PretrainedConfig] = {}
    for key, path in started.items():
        if path is not None:
            model = replace(cfg.policy, path=path)
            _check_tokenizer(cfg, tokenizer, model, key)
            configs[f"{key} {model.path}"] = load_config(model, key)
    readers = {f"reward.model.path {cfg.reward.model.path}": rm_config, **configs}
    check_vocabularies(tokenizer, f"policy.path {cfg.policy.path}", config, readers)
    limit, reserve = room_for_prompts(cfg, template, [config, *configs.values()], rm_config)

    def read(data: DataConfig) -> list[list[int]]:
        rows, report = load_prompts(data)
        tokenised, num_long = tokenise_prompts(rows, tokenizer, template, data, limit, reserve)
        log_rows(data, len(tokenised), report, num_long)
        return [row.prompt for row in tokenised]

    prompts = read(cfg.data)
    held_out = [] if cfg.eval_data is None else read(cfg.eval_data)
    return Inputs(start_run(cfg), tokenizer, template, prompts, held_out)


def load_models(cfg: PPOConfig, inputs: Inputs) -> Models:
    """The four models, each from its own folder; a fresh critic's head starts at 0."""
    pulse.phase("loading the four models")
    policy_steps, critic_steps = optimiser_steps(cfg)
    policy = build_engine(
        lambda zero: load_causal_lm(cfg.policy, zero_config=zero, train=True),
        cfg.engine,
        cfg.optim,
        policy_steps,
    )
    reference_cfg = replace(cfg.policy, path=cfg.reference or cfg.policy.path)
    reference = build_engine(
        lambda zero: load_causal_lm(reference_cfg, zero_config=zero, train=False),
        cfg.engine,
        None,
    )
    critic_cfg = replace(cfg.policy, path=cfg.critic.path or cfg.policy.path)
    critic = build_engine(
        lambda zero: load_value_model(critic_cfg, zero_config=zero, train=True, init="zero"),
        cfg.engine,
        cfg.critic.optim,
        critic_steps,
    )
    return Models(policy, reference, critic, _load_reward(cfg, inputs.template))


def optimiser_steps(cfg: PPOConfig) -> tuple[int, int]:
    """(of the policy, of the critic) over the whole run: what their schedules decay over."""
    per_phase = cfg.ppo_epochs * math.ceil(cfg.rollout_size / cfg.minibatch_size)
    policy_phases = max(0, cfg.total_steps - cfg.critic_warmup_steps)
    return max(1, policy_phases * per_phase), cfg.total_steps * per_phase


def room_for_prompts(
    cfg: PPOConfig,
    template: Template,
    policies: Sequence[PretrainedConfig],
    rm_config: PretrainedConfig,
) -> tuple[int | None, int]:
    """(positions of a model, positions needed after the prompt) where the prompt has least room.

    Policy, reference and critic need room for a response, a seq2seq RM for response, separator and
    response.
    """
    response = cfg.sampling.max_new_tokens
    after_rm = response
    if cfg.reward.kind == "seq2seq":
        after_rm += len(template.separator_ids) + response
    needs = [(position_limit(config), response) for config in policies]
    needs.append((position_limit(rm_config), after_rm))
    known = [(limit, after) for limit, after in needs if limit is not None]
    return min(known, key=lambda need: need[0] - need[1]) if known else (None, after_rm)


def _check_tokenizer(
    cfg: PPOConfig, tokenizer: PreTrainedTokenizerBase, other: ModelConfig, key: str
) -> None:
    """Every model reads the ids that the policy sampled."""
    check_same_tokenizer(
        tokenizer,
        load_tokenizer(other, key),
        other_name=f"{key} {other.path}",
        policy_name=f"policy.path {cfg.policy.path}",
    )


def _check_reward_model(
    cfg: PPOConfig, tokenizer: PreTrainedTokenizerBase, template: Template
) -> None:
    """Its ids are the policy's, its separator the configured one, its kind the configured one."""
    path = cfg.reward.model.path
    where = f"reward.model.path {path}"
    _check_tokenizer(cfg, tokenizer, cfg.reward.model, "reward.model.path")
    template.check_same(Template.load(path), where)
    has_score = (Path(path) / SCORE_FILE).is_file()
    if cfg.reward.kind == "scalar" and not has_score:
        raise UserError(f"{where} has no {SCORE_FILE}: it is not a scalar reward model")
    if cfg.reward.kind == "seq2seq" and has_score:
        raise UserError(f"{where} has a {SCORE_FILE}: it is a scalar RM; set reward.kind scalar")


def _load_reward(cfg: PPOConfig, template: Template) -> RewardModel:
    model: ModelConfig = cfg.reward.model

    def factory(zero: dict[str, Any] | None) -> Any:
        if cfg.reward.kind == "scalar":
            return load_value_model(model, zero_config=zero, train=False, init="saved")
        return load_causal_lm(model, zero_config=zero, train=False)

    engine = build_engine(factory, cfg.engine, None)
    if cfg.reward.kind == "scalar":
        return ScalarReward(engine, cfg.reward, microbatch_tokens=cfg.microbatch_tokens)
    return Seq2SeqReward(
        engine,
        template,
        cfg.reward,
        microbatch_tokens=cfg.microbatch_tokens,
        max_correction_tokens=cfg.sampling.max_new_tokens,
        generation_batch_size=cfg.sampling.batch_size,
        kv_cache_gib=cfg.sampling.kv_cache_gib,
    )
