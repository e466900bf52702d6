"""s2srm_kernels, one provider for each backend and order of the backward."""

from __future__ import annotations

import importlib.metadata

import torch

import s2srm_kernels
from benchmarks.problems import Problem
from benchmarks.providers.base import OUTPUTS, Provider, Run

# The operations that choose between gradients made in forward and recompute.
_TWO_ORDERS = ("linear_cross_entropy", "linear_ppo_loss")


class Ours(Provider):
    """impl="reference", "cpp" or "triton"; workspace_bytes None: the operation's own bound.

    0 asks for the least memory: the logits are made again.
    """

    def __init__(self, impl: str, workspace_bytes: int | None = None) -> None:
        self.impl = impl
        self.workspace_bytes = workspace_bytes
        suffix = "" if workspace_bytes is None else f"-{_words(workspace_bytes)}"
        self.name = f"s2srm-{impl}{suffix}"

    def version(self) -> str:
        try:
            return importlib.metadata.version("s2srm")
        except importlib.metadata.PackageNotFoundError:
            return "checkout"

    def missing(self, device: torch.device) -> str | None:
        return None

    def refuses(self, op: str, problem: Problem, backward: bool) -> str | None:
        if self.workspace_bytes is not None and not (backward and op in _TWO_ORDERS):
            return "there is one order only"
        return unavailable(op, self.impl, problem.device)

    def build(self, op: str, problem: Problem) -> Run:
        function = getattr(s2srm_kernels, op)
        arguments = [problem.hidden, problem.weight, problem.target]
        keywords: dict[str, object] = {
            "bias": problem.bias,
            "softcap": problem.softcap,
            "temperature": problem.temperature,
            "impl": self.impl,
        }
        if self.workspace_bytes is not None:
            keywords["workspace_bytes"] = self.workspace_bytes
        if op == "linear_cross_entropy":
            keywords["row_weight"] = problem.row_weight
            keywords["label_smoothing"] = problem.label_smoothing
            keywords["z_loss"] = problem.z_loss
            return lambda: {"loss": function(*arguments, **keywords)}
        if op == "linear_ppo_loss":
            arguments += [problem.old_logprobs, problem.advantages]
            keywords["clip_low"] = keywords["clip_high"] = problem.clip
            keywords["entropy_coef"] = problem.entropy_coef
            if problem.kl_coef:
                keywords["kl_coef"] = problem.kl_coef
                keywords["ref_logprobs"] = problem.ref_logprobs
            return lambda: {"loss": function(*arguments, **keywords).loss}

        def rows() -> dict[str, torch.Tensor]:
            made = function(*arguments, **keywords)
            return {name: getattr(made, name) for name in OUTPUTS[op]}

        return rows


def _words(workspace_bytes: int) -> str:
    """recompute, 64MiB, 1000B"""
    mib, rest = divmod(workspace_bytes, 2**20)
    return "recompute" if workspace_bytes == 0 else f"{workspace_bytes}B" if rest else f"{mib}MiB"


def unavailable(op: str, impl: str, device: torch.device) -> str | None:
    """The reason that the library itself gives for having no such backend here."""
    from s2srm_kernels.dispatch import select

    try:
        select(op, impl, device)
    except ValueError as error:
        return str(error)
    return None
