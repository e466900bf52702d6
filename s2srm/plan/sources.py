"""From a model's path to its architecture, with neither weights nor network.

A local folder's config.json is read. A hub name is one of the architectures that this package
ships. A folder that a shipped recipe will write, and that is not there yet, has the architecture of
the model which that recipe starts from; the model that `s2srm demo` makes has its world's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import AutoConfig, PretrainedConfig

from s2srm.config import ModelConfig
from s2srm.errors import UserError
from s2srm.models.load import unsupported
from s2srm.worlds import get_world

ARCHITECTURES = Path(__file__).resolve().parent / "architectures"
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


class Source(NamedTuple):
    """An architecture, and in words where it comes from."""

    config: PretrainedConfig
    origin: str


def find_architecture(cfg: ModelConfig, key: str) -> Source:
    """The architecture of cfg.path. UserError, which names `key`, where it cannot be known."""
    path, trail = cfg.path, ""
    bases = dict(recipe_bases())
    while not (Path(path) / "config.json").is_file() and _normal(path) in bases:
        path, recipe = bases[_normal(path)]
        trail += f", which recipe {recipe} trains from {path}"
    found = _local(path, cfg) or _shipped(path) or _demo(path)
    if found is None:
        raise UserError(
            f"{key} {cfg.path}: no config.json there, and not an architecture that is shipped "
            f"({', '.join(sorted(shipped()))}); give a folder with the model's config.json"
        )
    fault = unsupported(found.config, cfg.trust_remote_code)
    if fault is not None:
        raise UserError(f"{key} {cfg.path}: {fault}")
    return Source(found.config, f"{cfg.path}{trail}: {found.origin}" if trail else found.origin)


def recipe_bases() -> Iterator[tuple[str, tuple[str, str]]]:
    """(output folder of a shipped recipe, (path of the model it starts from, the recipe))."""
    for file in sorted(RECIPES.glob("*.yaml")):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        model = values.get("model") or values["policy"]
        yield _normal(values["output"]), (model["path"], file.stem)


def shipped() -> dict[str, Path]:
    """Hub name -> file of its architecture."""
    files = sorted(ARCHITECTURES.glob("*.json"))
    return {json.loads(file.read_text(encoding="utf-8"))["hub_name"]: file for file in files}


def _local(path: str, cfg: ModelConfig) -> Source | None:
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error
    return Source(config, "its config.json")


def _shipped(path: str) -> Source | None:
    file = shipped().get(path)
    if file is None:
        return None
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    del values["hub_name"]
    return Source(AutoConfig.for_model(**values), f"the shipped architecture {file.stem}")


def _demo(path: str) -> Source | None:
    parts = Path(path).parts
    if parts[:2] != ("runs", "demo") or parts[3:] != ("data", "model"):
        return None
    return Source(get_world(parts[2]).model_config(), f"what s2srm demo makes for {parts[2]}")


def _normal(path: str) -> str:
    return Path(path).as_posix()
