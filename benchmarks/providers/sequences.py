"""gae and token_rewards: our backends, and the padded loop that trainers run.

The padded baseline gets padded inputs for nothing: packing is not in its time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import s2srm_kernels
from benchmarks.problems import SequenceProblem
from benchmarks.providers.ours import Ours, unavailable

SEQUENCE_OPS = ("gae", "token_rewards")
_MAX_LONGEST = 4096
_MAX_PADDING = 4.0

SequenceRun = Callable[[], tuple[Tensor, Tensor]]


class OurSequences:
    """impl="reference" or "cpp": C++ on the CPU, CUDA C++ on a GPU."""

    def __init__(self, impl: str) -> None:
        self.impl = impl
        self.name = f"s2srm-{impl}"

    def version(self) -> str:
        return Ours(self.impl).version()

    def refuses(self, op: str, problem: SequenceProblem) -> str | None:
        return unavailable(op, self.impl, problem.device)

    def build(self, op: str, problem: SequenceProblem) -> SequenceRun:
        return lambda: call(op, self.impl, problem, problem.rewards, problem.values)


class TorchPadded:
    """(B, T) tensors; gae steps backwards through T, token_rewards finds where agreement ends."""

    name = "torch-padded"

    def version(self) -> str:
        return torch.__version__

    def refuses(self, op: str, problem: SequenceProblem) -> str | None:
        longest = int(_lengths(problem).max())
        if longest > _MAX_LONGEST:
            return f"the longest sequence has {longest} tokens: a Python step for each"
        if longest * problem.shape.num_sequences > _MAX_PADDING * problem.shape.num_rows:
            return "more than three quarters would be padding"
        return None

    def build(self, op: str, problem: SequenceProblem) -> SequenceRun:
        lengths = _lengths(problem)
        steps = torch.arange(int(lengths.max()), device=problem.device)
        mask = steps[None] < lengths[:, None]

        def pad(values: Tensor) -> Tensor:
            return values.new_zeros(mask.shape).masked_scatter_(mask, values)

        if op == "gae":
            rewards, values = pad(problem.rewards), pad(problem.values)
            return lambda: _padded_gae(rewards, values, mask)
        response, argmax = pad(problem.response), pad(problem.argmax)
        return lambda: _padded_token_rewards(response, argmax, lengths)

    @staticmethod
    def packed(made: tuple[Tensor, Tensor], problem: SequenceProblem) -> tuple[Tensor, Tensor]:
        """The padded results as the operation has them."""
        lengths = _lengths(problem)
        steps = torch.arange(int(lengths.max()), device=problem.device)
        mask = steps[None] < lengths[:, None]
        first, second = (t[mask] if t.dim() == 2 else t for t in made)
        return first, second


SEQUENCE_PROVIDERS = (OurSequences("cpp"), OurSequences("reference"), TorchPadded())


def call(
    op: str, impl: str, problem: SequenceProblem, rewards: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """The operation with the settings of the recipes; rewards and values in any dtype."""
    made: Any
    if op == "gae":
        made = s2srm_kernels.gae(rewards, values, problem.cu_seqlens, lam=0.95, impl=impl)
    else:
        made = s2srm_kernels.token_rewards(
            problem.response, problem.argmax, problem.cu_seqlens, impl=impl
        )
    return made[0], made[1]


def _lengths(problem: SequenceProblem) -> Tensor:
    return problem.cu_seqlens.diff().long()


def _padded_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    advantages = torch.empty_like(rewards)
    following = next_values = rewards.new_zeros(rewards.shape[0])
    # Padding is 0 in rewards and values, so it adds nothing to what stands before it.
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + next_values - values[:, t]
        following = delta + 0.95 * following
        next_values = values[:, t]
        advantages[:, t] = following
    return advantages, advantages + values


def _padded_token_rewards(
    response: Tensor, argmax: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    agree = response == argmax
    agreed = agree.cumprod(dim=1)
    rewards = torch.where(agreed > 0, 1.0, torch.where(agree, 0.0, -1.0))
    return rewards, torch.minimum(agreed.sum(dim=1), lengths)
