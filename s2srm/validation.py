"""Values that have the right type and still make no sense: refused before anything heavy starts.

Each check raises UserError that names the dotted key and the value. Left out:
what needs the model or the data to be known (token limits, templates), which the loaders check.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

from s2srm.config import (
    CriticConfig,
    DataConfig,
    KLConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RMConfig,
    SamplingConfig,
    ScalarRMConfig,
    StageConfig,
    SupervisedConfig,
    TokenRewardConfig,
)
from s2srm.errors import UserError
from s2srm.outputs import exists, probe_folder

Config = TypeVar("Config")
Stage = TypeVar("Stage", bound=StageConfig)

_PATHS = {"output", "path", "reference", "rm"}
"""Names of the settings that hold a path or a hub name."""
_DATA_SUFFIXES = (".jsonl", ".json", ".parquet")


def validate(cfg: Stage) -> Stage:
    """Check every value of a stage's config, and that output can be written. Raises UserError.

    Returns the config with its paths expanded, which is the one to run. Commands call it before
    anything heavy is imported; stages call it too, for those who run them from Python.
    """
    cfg = expand_paths(cfg)
    output_folder(cfg.output, "the folder for the trained model and its metrics")
    _log(cfg.log)
    at_least("seed", cfg.seed, 0)
    at_least("watchdog", cfg.watchdog, 0)
    _checkpoints(cfg)
    if isinstance(cfg, SupervisedConfig):
        _supervised(cfg)
    if isinstance(cfg, RMConfig):
        _rm(cfg)
    if isinstance(cfg, ScalarRMConfig):
        at_least("centre_coef", cfg.centre_coef, 0)
    if isinstance(cfg, PPOConfig):
        _ppo(cfg)
    return cfg


def expand_paths(cfg: Config) -> Config:
    """A copy of a config dataclass with the home folder for `~` in every path; `$NAME` stays."""
    return _expanded(cfg, "")


def _expanded(value: Any, key: str) -> Any:
    name = key.rpartition(".")[2]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {
            f.name: _expanded(getattr(value, f.name), f"{key}.{f.name}".lstrip("."))
            for f in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **changes)
    if name == "policies" and isinstance(value, dict):
        return {inner: expand_path(f"{key}.{inner}", path) for inner, path in value.items()}
    if name in _PATHS and isinstance(value, str):
        return expand_path(key, value)
    return value


def expand_path(key: str, path: str) -> str:
    """The home folder for `~` and `~name`. UserError where there is no such user."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{key}: {path}: there is no user {expanded.split('/')[0][1:]!r}")
    return expanded


def output_folder(output: str, what: str) -> None:
    """It is named and can be written: looked at on rank 0, which makes it."""
    if not output:
        raise UserError(f"output is missing: {what}")
    if os.environ.get("RANK", "0") == "0":
        probe_folder("output", Path(output))


def _checkpoints(cfg: StageConfig) -> None:
    at_least("save_every", cfg.save_every, 0)
    at_least("keep_checkpoints", cfg.keep_checkpoints, 1)
    if cfg.resume == "never":
        return
    if cfg.overwrite:
        raise UserError(
            f"resume is {cfg.resume} and overwrite is true: one goes on, the other starts anew; "
            "give one of them"
        )
    if cfg.resume != "auto" and not Path(cfg.resume).expanduser().is_dir():
        raise UserError(
            f"resume must be never, auto or the folder of a run or checkpoint, got {cfg.resume!r}, "
            "which is no folder"
        )


def at_least(key: str, value: float, low: float) -> None:
    """value >= low, NaN refused."""
    if not value >= low:
        raise UserError(f"{key} must be at least {low}, got {value}")


def above(key: str, value: float, low: float) -> None:
    """value > low, NaN refused."""
    if not value > low:
        raise UserError(f"{key} must be greater than {low}, got {value}")


def between(key: str, value: float, low: float, high: float) -> None:
    """low <= value <= high, NaN refused."""
    if not low <= value <= high:
        raise UserError(f"{key} must lie between {low} and {high}, got {value}")


def model(key: str, cfg: ModelConfig) -> None:
    """A model that is named and, where the name is a local path, there."""
    if not cfg.path:
        raise UserError(f"{key}.path is missing: the folder or hub name of the model")
    model_path(f"{key}.path", cfg.path)


def model_path(key: str, name: str) -> None:
    """A local path must be a folder; what is in it, and hub names, are left to the loader."""
    path = Path(name)
    if exists(path):
        if path.is_file():
            raise UserError(f"{key}: {name} is a file; a model is a folder with config.json")
    elif _is_local(name):
        raise UserError(f"{key}: {name} does not exist")


def data(key: str, cfg: DataConfig) -> None:
    """Preference data, demonstrations or prompts."""
    if not cfg.path:
        raise UserError(f"{key}.path is missing: a data file, a folder or a hub name")
    local = _is_local(cfg.path) or cfg.path.endswith(_DATA_SUFFIXES)
    if local and not exists(cfg.path):
        raise UserError(f"{key}.path: {cfg.path} does not exist")
    if cfg.format == "columns" and not cfg.columns:
        raise UserError(f"{key}.columns is missing: format columns needs to know which is which")
    at_least(f"{key}.max_prompt_tokens", cfg.max_prompt_tokens, 1)
    at_least(f"{key}.max_response_tokens", cfg.max_response_tokens, 1)
    if cfg.limit is not None:
        at_least(f"{key}.limit", cfg.limit, 1)


def sampling(key: str, cfg: SamplingConfig, *, greedy: bool) -> None:
    """Sampling settings; temperature 0 only where greedy decoding makes sense."""
    at_least(f"{key}.max_new_tokens", cfg.max_new_tokens, 1)
    at_least(f"{key}.batch_size", cfg.batch_size, 1)
    if greedy:
        at_least(f"{key}.temperature", cfg.temperature, 0)
    else:
        above(f"{key}.temperature", cfg.temperature, 0)


def _supervised(cfg: SupervisedConfig) -> None:
    model("model", cfg.model)
    data("data", cfg.data)
    if cfg.eval_data is not None:
        data("eval_data", cfg.eval_data)
    _optim("optim", cfg.optim)
    above("epochs", cfg.epochs, 0)
    if cfg.max_steps is not None:
        at_least("max_steps", cfg.max_steps, 1)
    at_least("batch_size", cfg.batch_size, 1)
    at_least("microbatch_tokens", cfg.microbatch_tokens, 1)
    at_least("eval_every", cfg.eval_every, 0)


def _rm(cfg: RMConfig) -> None:
    at_least("correction_weight", cfg.correction_weight, 0)
    at_least("identity_weight", cfg.identity_weight, 0)
    if cfg.correction_weight == cfg.identity_weight == 0:
        raise UserError("correction_weight and identity_weight are both 0: nothing to learn")
    at_least("probe_rows", cfg.probe_rows, 0)


def _ppo(cfg: PPOConfig) -> None:
    model("policy", cfg.policy)
    if cfg.reference is not None:
        model_path("reference", cfg.reference)
    _reward(cfg.reward)
    _critic(cfg.critic)
    data("data", cfg.data)
    sampling("sampling", cfg.sampling, greedy=False)
    _optim("optim", cfg.optim)
    _kl(cfg.kl)
    for key in ("total_steps", "rollout_size", "minibatch_size", "ppo_epochs", "microbatch_tokens"):
        at_least(key, getattr(cfg, key), 1)
    if cfg.minibatch_size > cfg.rollout_size:
        raise UserError(
            f"minibatch_size must be at most rollout_size ({cfg.rollout_size}), "
            f"got {cfg.minibatch_size}"
        )
    at_least("critic_warmup_steps", cfg.critic_warmup_steps, 0)
    between("gamma", cfg.gamma, 0, 1)
    between("lam", cfg.lam, 0, 1)
    between("clip_low", cfg.clip_low, 0, 1)
    at_least("clip_high", cfg.clip_high, 0)
    between("max_log_ratio", cfg.max_log_ratio, 0, 80)
    at_least("vf_coef", cfg.vf_coef, 0)
    at_least("entropy_coef", cfg.entropy_coef, 0)
    at_least("samples_every", cfg.samples_every, 1)


def _reward(cfg: RewardConfig) -> None:
    model("reward.model", cfg.model)
    token_reward("reward.token", cfg.token)
    at_least("reward.missing_eos_penalty", cfg.missing_eos_penalty, 0)
    at_least("reward.clip", cfg.clip, 0)
    # A standard deviation needs two responses.
    at_least("reward.calibration_prompts", cfg.calibration_prompts, 2)


def token_reward(key: str, cfg: TokenRewardConfig) -> None:
    """Coefficients of the token rewards."""
    at_least(f"{key}.top_k", cfg.top_k, 1)
    at_least(f"{key}.max_margin", cfg.max_margin, 0)
    at_least(f"{key}.negative", cfg.negative, 0)
    at_least(f"{key}.positive", cfg.positive, 0)


def _critic(cfg: CriticConfig) -> None:
    if cfg.path is not None:
        model_path("critic.path", cfg.path)
    _optim("critic.optim", cfg.optim)
    at_least("critic.clip", cfg.clip, 0)


def _kl(cfg: KLConfig) -> None:
    at_least("kl.coef", cfg.coef, 0)
    above("kl.target", cfg.target, 0)
    at_least("kl.horizon", cfg.horizon, 1)


def _optim(key: str, cfg: OptimConfig) -> None:
    above(f"{key}.lr", cfg.lr, 0)
    for i, beta in enumerate(cfg.betas):
        if not 0 <= beta < 1:
            raise UserError(f"{key}.betas[{i}] must lie in [0, 1), got {beta}")
    above(f"{key}.eps", cfg.eps, 0)
    at_least(f"{key}.weight_decay", cfg.weight_decay, 0)
    at_least(f"{key}.warmup_steps", cfg.warmup_steps, 0)
    at_least(f"{key}.max_grad_norm", cfg.max_grad_norm, 0)


def _log(cfg: LogConfig) -> None:
    at_least("log.every", cfg.every, 1)


def _is_local(name: str) -> bool:
    """Whether a name can only be a path: hub names are `name` or `owner/name`."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1
