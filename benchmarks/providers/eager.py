"""PyTorch: the materialised (N, V) logits in eager mode and compiled, and its own chunked loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.definitions import cross_entropy_rows, ppo_rows, rows_of, stats_of
from benchmarks.problems import IGNORE_INDEX, Problem
from benchmarks.providers.base import OUTPUTS, Provider, Run, cuda_only, plain_head

_ALL = slice(None)


class Eager(Provider):
    """logits = hidden @ weight.T for every row, as a trainer without a fused loss does it."""

    name = "torch-eager"

    def version(self) -> str:
        return torch.__version__

    def missing(self, device: torch.device) -> str | None:
        return None

    def refuses(self, op: str, problem: Problem, backward: bool) -> str | None:
        return None

    def build(self, op: str, problem: Problem) -> Run:
        function = _materialised(op, problem)
        return lambda: function(problem.hidden, problem.weight, problem.bias)


class Compiled(Eager):
    """The same under torch.compile."""

    name = "torch-compile"

    def missing(self, device: torch.device) -> str | None:
        return cuda_only(device)

    def build(self, op: str, problem: Problem) -> Run:
        # Dynamo would keep the graphs of all earlier shapes and give up after eight.
        torch.compiler.reset()
        function = torch.compile(_materialised(op, problem), dynamic=False)
        return lambda: function(problem.hidden, problem.weight, problem.bias)


def _materialised(
    op: str, problem: Problem
) -> Callable[[Tensor, Tensor, Tensor | None], dict[str, Tensor]]:
    # Made now, so that the call itself only computes.
    target, safe, mask = problem.target, problem.safe_target, problem.live_mask
    num_live = max(1, problem.num_live)
    names = OUTPUTS[op]
    if op == "linear_ppo_loss":
        _ = problem.old_logprobs, problem.advantages
        if problem.kl_coef:
            _ = problem.ref_logprobs

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        z = problem.logits(hidden, weight, bias)
        if op == "linear_cross_entropy":
            if problem.z_loss or problem.row_weight is not None:
                losses = cross_entropy_rows(problem, z, safe, _ALL)
                return {"loss": (losses * mask).sum() / num_live}
            smoothing = problem.label_smoothing
            return {
                "loss": F.cross_entropy(
                    z, target, ignore_index=IGNORE_INDEX, label_smoothing=smoothing
                )
            }
        if op == "linear_ppo_loss":
            if problem.entropy_coef:
                made = rows_of(z, safe)
                losses = ppo_rows(problem, made["logprobs"], made["entropy"], _ALL)
            else:
                logprobs = -F.cross_entropy(z, safe, reduction="none")
                losses = ppo_rows(problem, logprobs, None, _ALL)
            return {"loss": torch.where(mask > 0, losses, 0).sum() / num_live}
        made = (stats_of if op == "linear_token_stats" else rows_of)(z, safe)
        live = mask > 0
        return {name: torch.where(live, made[name], 0) for name in names}

    return run


class TorchChunked(Provider):
    """F.linear_cross_entropy with its chunked backend, torch 2.13 and later."""

    name = "torch-chunked"

    def version(self) -> str:
        return torch.__version__

    def missing(self, device: torch.device) -> str | None:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return f"needs torch >= 2.13, this is {torch.__version__}"
        return None

    def refuses(self, op: str, problem: Problem, backward: bool) -> str | None:
        if op != "linear_cross_entropy":
            return "has the cross-entropy only"
        return plain_head(problem)

    def build(self, op: str, problem: Problem) -> Run:
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda: {
            "loss": F.linear_cross_entropy(
                *(problem.hidden, problem.weight, problem.target),
                ignore_index=IGNORE_INDEX,
                options=options,
            )
        }
