"""Settings that make no sense: refused before anything heavy starts.

Bounds of one setting stand on its field (`bounds`); here is what concerns several settings, and
what is or can be on the disk. Each check raises UserError that names the dotted key and the value.
Left out: what needs the model or the data to be known (token limits, templates), which the loaders
check.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

from s2srm.bounds import check_bounds
from s2srm.config import (
    DataConfig,
    ModelConfig,
    PPOConfig,
    RMConfig,
    StageConfig,
    SupervisedConfig,
)
from s2srm.errors import UserError
from s2srm.outputs import probe_folder
from s2srm.paths import exists, looks_like_path, nearest_entry

Config = TypeVar("Config")
Stage = TypeVar("Stage", bound=StageConfig)

_PATHS = {"output", "path", "reference", "rm"}
"""Names of the settings that hold a path or a hub name."""


def validate(cfg: Stage) -> Stage:
    """Check every value of a stage's config, and that output can be written. Raises UserError.

    Returns the config with its paths expanded, which is the one to run. Commands call it before
    anything heavy is imported; stages call it too, for those who run them from Python.
    """
    cfg = expand_paths(cfg)
    output_folder(cfg.output, "the folder for the trained model and its metrics")
    check_bounds(cfg)
    _resume(cfg)
    if isinstance(cfg, SupervisedConfig):
        _supervised(cfg)
    if isinstance(cfg, RMConfig):
        _rm(cfg)
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


def _resume(cfg: StageConfig) -> None:
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
    elif looks_like_path(name):
        raise UserError(f"{key}: {name} does not exist")


def data(key: str, cfg: DataConfig) -> None:
    """Preference data, demonstrations or prompts."""
    if not cfg.path:
        raise UserError(f"{key}.path is missing: a data file, a folder or a hub name")
    if looks_like_path(cfg.path) and not exists(cfg.path):
        raise UserError(f"{key}.path: {cfg.path} does not exist{nearest_entry(Path(cfg.path))}")
    if cfg.format == "columns" and not cfg.columns:
        raise UserError(f"{key}.columns is missing: format columns needs to know which is which")


def _supervised(cfg: SupervisedConfig) -> None:
    model("model", cfg.model)
    data("data", cfg.data)
    _evaluation(cfg, cfg.eval_data)


def _evaluation(cfg: StageConfig, eval_data: DataConfig | None) -> None:
    if eval_data is not None:
        data("eval_data", eval_data)
    if cfg.keep_best is None:
        return
    if not cfg.keep_best.startswith("eval/"):
        raise UserError(
            f"keep_best must name a metric of the evaluation, as eval/loss, got {cfg.keep_best!r}"
        )
    if eval_data is None:
        raise UserError(
            f"keep_best is {cfg.keep_best} and eval_data is missing: nothing is evaluated"
        )


def _rm(cfg: RMConfig) -> None:
    if cfg.correction_weight == cfg.identity_weight == 0:
        raise UserError("correction_weight and identity_weight are both 0: nothing to learn")


def _ppo(cfg: PPOConfig) -> None:
    model("policy", cfg.policy)
    for key, name in (("reference", cfg.reference), ("critic.path", cfg.critic.path)):
        if name is not None:
            model_path(key, name)
    model("reward.model", cfg.reward.model)
    data("data", cfg.data)
    _evaluation(cfg, cfg.eval_data)
    if cfg.sampling.temperature == 0:
        raise UserError("sampling.temperature must be greater than 0 where responses are sampled")
    if cfg.minibatch_size > cfg.rollout_size:
        raise UserError(
            f"minibatch_size must be at most rollout_size ({cfg.rollout_size}), "
            f"got {cfg.minibatch_size}"
        )
