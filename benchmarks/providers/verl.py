"""verl's Triton kernel: log-probabilities and entropy with a recomputing backward.

Only its file is loaded. The package's own __init__ imports the whole trainer (ray, tensordict), so
empty packages with verl's path stand in for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.problems import Problem
from benchmarks.providers.base import RowProvider, Run, absent, cuda_only

_PACKAGES = ("verl", "verl.utils", "verl.utils.kernel")


class Verl(RowProvider):
    """No ignore_index: prompt rows are computed like all others and masked afterwards."""

    name = "verl"
    has_entropy: ClassVar[bool] = True

    def version(self) -> str:
        file = _root() / "version" / "version"
        return file.read_text().strip() if file.exists() else "checkout"

    def missing(self, device: torch.device) -> str | None:
        return absent("verl", "verl --no-deps") or cuda_only(device)

    def refuses(self, op: str, problem: Problem, backward: bool) -> str | None:
        if problem.shape.hidden_size % 128:
            return "the hidden size must be a multiple of 128"
        return super().refuses(op, problem, backward)

    def rows(self, problem: Problem) -> Run:
        kernel = _load()
        target = problem.safe_target

        def run() -> dict[str, Tensor]:
            logprobs, entropy = kernel.linear_cross_entropy(
                problem.hidden, problem.weight, target, 1.0, "none", None
            )
            return {"logprobs": logprobs, "entropy": entropy}

        return run


def _root() -> Path:
    spec = importlib.util.find_spec("verl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def _load() -> Any:
    root = _root().parent
    for name in _PACKAGES:
        if name not in sys.modules:
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(root.joinpath(*name.split(".")))]
            sys.modules[name] = importlib.util.module_from_spec(spec)
    return importlib.import_module("verl.utils.kernel.linear_cross_entropy")
