"""What a provider is: someone's implementation of some of the vocabulary operations.

A provider is asked three questions before it runs: is it here (`missing`), does it do this call
(`refuses`), what does it give (`outputs`). Every answer of "no" is a sentence that lands in the
results instead of a time.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.definitions import ppo_rows
from benchmarks.problems import Problem

Run = Callable[[], dict[str, Tensor]]


class Provider(ABC):
    """One column of a table."""

    name: str

    @abstractmethod
    def version(self) -> str:
        """Version of the code behind it; called only when nothing is missing."""

    @abstractmethod
    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run on this machine and device, None if it can."""

    @abstractmethod
    def refuses(self, op: str, problem: Problem, backward: bool) -> str | None:
        """Why it has no such call, None if it has."""

    def outputs(self, op: str) -> tuple[str, ...]:
        """Names of what `build` gives: the operation's outputs, or those of them that it knows."""
        return OUTPUTS[op]

    @abstractmethod
    def build(self, op: str, problem: Problem) -> Run:
        """The call to time. Its outputs are differentiable when gradients are enabled."""


# What is compared and differentiated, by operation. lse is left out of linear_logprobs: no peer
# differentiates it, and it costs nothing.
OUTPUTS = {
    "linear_cross_entropy": ("loss",),
    "linear_logprobs": ("logprobs", "entropy"),
    "linear_token_stats": (
        *("logprobs", "entropy", "lse"),
        *("argmax", "max_logit", "target_logit", "rank"),
    ),
    "linear_ppo_loss": ("loss",),
}


class RowProvider(Provider):
    """A provider of per-row log-probabilities, from which losses are made with a few torch calls.

    That is how such kernels are used in PPO trainers; the (N,) arithmetic is nothing beside a
    product.
    """

    has_entropy: ClassVar[bool]

    @abstractmethod
    def rows(self, problem: Problem) -> Run:
        """logprobs (N,) and, with has_entropy, entropy (N,); anything in ignored rows."""

    def refuses(self, op: str, problem: Problem, backward: bool) -> str | None:
        return plain_head(problem)

    def outputs(self, op: str) -> tuple[str, ...]:
        if op in ("linear_logprobs", "linear_token_stats"):
            return ("logprobs", "entropy") if self.has_entropy else ("logprobs",)
        return OUTPUTS[op]

    def build(self, op: str, problem: Problem) -> Run:
        rows, mask = self.rows(problem), problem.live_mask
        if op in ("linear_logprobs", "linear_token_stats"):
            return lambda: {name: value * mask for name, value in rows().items()}
        everyone, num_live = slice(None), max(1, problem.num_live)
        if op == "linear_cross_entropy":
            return lambda: {"loss": -(rows()["logprobs"] * mask).sum() / num_live}

        def ppo() -> dict[str, Tensor]:
            made = rows()
            losses = ppo_rows(problem, made["logprobs"].float(), made.get("entropy"), everyone)
            return {"loss": torch.where(mask > 0, losses, 0).sum() / num_live}

        return ppo


def plain_head(problem: Problem) -> str | None:
    """The reason why a provider without options does not do a problem that has some."""
    options = {
        "bias": problem.bias is not None,
        "row_weight": problem.row_weight is not None,
        "softcap": problem.softcap is not None,
        "temperature": problem.temperature != 1.0,
        "label_smoothing": problem.label_smoothing != 0,
        "z_loss": problem.z_loss != 0,
        "kl_coef": problem.kl_coef != 0,
        "entropy_coef": problem.entropy_coef != 0,
    }
    used = [name for name, on in options.items() if on]
    return f"not asked for {', '.join(used)}" if used else None


def absent(module: str, distribution: str) -> str | None:
    """The reason why a package cannot be imported, without importing it."""
    if importlib.util.find_spec(module) is None:
        return f"not installed: no module {module} (pip install {distribution})"
    return None


def package_version(distribution: str) -> str:
    """Version of an installed distribution; `checkout` where only its source is on the path."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "checkout"


def hopper(device: torch.device) -> str | None:
    """The reason why a kernel for compute capability 9.0 does not run here."""
    if device.type != "cuda":
        return "needs a GPU"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "needs compute capability 9.0"
    return None


def cuda_only(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a GPU"
