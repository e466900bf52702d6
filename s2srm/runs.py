"""A run's folder: made before anything heavy, with the config and the versions that produced it.

A folder that holds a run is refused, replaced when that was asked for, or gone on with, which
`s2srm.checkpoint` decides.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import yaml

from s2srm import distributed
from s2srm.checkpoint.files import write_atomically
from s2srm.errors import UserError
from s2srm.outputs import probe_folder, writing
from s2srm.paths import exists

MARKER = "versions.json"
"""A folder with this file in it belongs to s2srm."""
CONFIG = "config.yaml"
FINISHED = "finished.json"
"""Written when everything else is: the run is complete."""
_STARTED = {MARKER, CONFIG}
"""A folder with no more than these is a run that stopped before its first step."""

_PACKAGES = (
    "s2srm",
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
)


class HasOutput(Protocol):
    """A config dataclass with the two settings that place a run."""

    @property
    def output(self) -> str: ...
    @property
    def overwrite(self) -> bool: ...


@dataclass(frozen=True)
class RunResult:
    """What a stage hands back: its folder and its last value of every metric."""

    output: Path
    metrics: dict[str, float] = field(default_factory=dict)


def versions() -> dict[str, str | None]:
    """Version of Python and of every package that shapes a result; None where not installed.

    Read from the packages' metadata: nothing is imported.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def config_to_dict(cfg: Any) -> Any:
    """Dataclasses, tuples and paths -> what YAML and JSON can hold; the rest as it is."""
    if dataclasses.is_dataclass(cfg) and not isinstance(cfg, type):
        return {f.name: config_to_dict(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}
    if isinstance(cfg, dict):
        return {key: config_to_dict(value) for key, value in cfg.items()}
    if isinstance(cfg, list | tuple):
        return [config_to_dict(value) for value in cfg]
    return str(cfg) if isinstance(cfg, Path) else cfg


def prepare_output(cfg: HasOutput, *, going_on: bool = False) -> Path:
    """Make the run's folder on rank 0 and write config.yaml and versions.json into it.

    going_on: the folder holds this very run, which is resumed.

    Raises UserError on every rank of a started process group (before one exists: on rank 0, whose
    exit ends the others) if `output` is not given, cannot be written, holds a run and `overwrite`
    is off, holds something that is not a run, holds an input of this very run, or lies in a folder
    of its data.
    """
    output = Path(cfg.output)
    problem = _prepare(output, cfg, going_on) if distributed.is_main() else None
    problem = distributed.gather_objects(problem)[0]
    if problem is not None:
        raise UserError(problem)
    return output


def finish_run(output: Path, cfg: Any, metrics: dict[str, float]) -> RunResult:
    """Mark the run as complete, on rank 0, once everything else is written."""
    if distributed.is_main():
        found = {"stage": type(cfg).__name__, "metrics": metrics, "config": config_to_dict(cfg)}
        write_atomically(output / FINISHED, json.dumps(found, indent=1) + "\n")
    return RunResult(output, metrics)


def clear_run(output: Path) -> None:
    """Remove everything in a run's folder, and last what says that it is a run.

    The folder stays itself: it may be a link, or where the process stands.
    """
    own = [output / CONFIG, output / MARKER]
    found = list(output.iterdir()) if output.is_dir() else []
    for path in [*(path for path in found if path not in own), *own]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _prepare(output: Path, cfg: HasOutput, going_on: bool) -> str | None:
    """Do it, or say in one line why not."""
    if not cfg.output:
        return "output is missing: the folder for the trained model and its metrics"
    try:
        probe_folder("output", output)
        problem = _occupied(output, cfg, going_on)
        if problem is not None:
            return problem
        with writing(output):
            if not going_on:
                clear_run(output)
            output.mkdir(parents=True, exist_ok=True)
            write_atomically(output / MARKER, json.dumps(versions(), indent=2) + "\n")
            text = yaml.safe_dump(config_to_dict(cfg), sort_keys=False, allow_unicode=True)
            write_atomically(output / CONFIG, text)
    except UserError as error:
        return str(error)
    return None


def _occupied(output: Path, cfg: HasOutput, going_on: bool) -> str | None:
    """What stands in the folder that must not be replaced, or reads what will be written there."""
    inputs = [(k, p) for k, p in _paths(config_to_dict(cfg)) if k != "output"]
    for where, path in inputs:
        is_data = where in ("data.path", "eval_data.path", "ood_data.path") and path.is_dir()
        if is_data and output.resolve().is_relative_to(path.resolve()):
            return f"output: {output} lies in {where} {path}, where it would be read as data"
    names = {path.name for path in output.iterdir()} if output.is_dir() else set[str]()
    names -= {f".{name}.tmp" for name in _STARTED}
    if going_on or not names - _STARTED:
        return None
    if MARKER not in names:
        return f"output: {output} is not empty and holds no s2srm run; give another folder"
    if not cfg.overwrite:
        return f"output: {output} already holds a run; give another folder or --overwrite true" + (
            ", or --resume auto to go on with it" if hasattr(cfg, "resume") else ""
        )
    for where, path in inputs:
        if path.resolve().is_relative_to(output.resolve()):
            return f"output: replacing {output} would delete {where}: {path}"
    return None


def _paths(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Every (dotted key, path) of the config whose value names something that exists."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")
        elif isinstance(value, str) and value and exists(value):
            yield prefix + key, Path(value)
