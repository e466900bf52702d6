"""Liger-Kernel: Triton FLCE, the CuTe kernels for Hopper and the chunked GRPO loss."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.problems import IGNORE_INDEX, Problem
from benchmarks.providers.base import (
    Provider,
    RowProvider,
    Run,
    absent,
    cuda_only,
    hopper,
    package_version,
    plain_head,
)


class _Liger(Provider):
    op: ClassVar[str]

    def version(self) -> str:
        return package_version("liger-kernel")

    def missing(self, device: torch.device) -> str | None:
        return absent("liger_kernel", "liger-kernel")

    def refuses(self, op: str, problem: Problem, backward: bool) -> str | None:
        return plain_head(problem) if op == self.op else f"has {self.op} only"


class LigerTriton(_Liger):
    """Its default: gradients of the weight are summed over chunks in the weight's dtype."""

    name = "liger-triton"
    op: ClassVar[str] = "linear_cross_entropy"
    accum_dtype: ClassVar[torch.dtype | None] = None

    def missing(self, device: torch.device) -> str | None:
        return super().missing(device) or cuda_only(device)

    def build(self, op: str, problem: Problem) -> Run:
        from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore
            LigerFusedLinearCrossEntropyFunction,
        )

        # bias, class weight, ignore_index, z-loss, smoothing, reduction, softcap, return z-loss,
        # dtype of the sum over chunks.
        options = (None, None, IGNORE_INDEX, 0.0, 0.0, "mean", None, False, self.accum_dtype)

        def run() -> dict[str, Tensor]:
            made: Any = LigerFusedLinearCrossEntropyFunction.apply(
                problem.hidden, problem.weight, problem.target, *options
            )
            return {"loss": made[0]}

        return run


class LigerTritonFloat32(LigerTriton):
    """The same with float32 sums, as it advises where training is unstable."""

    name = "liger-triton-fp32"
    accum_dtype: ClassVar[torch.dtype | None] = torch.float32


class LigerSM90(_Liger):
    """CuTe cross-entropy for Hopper, which keeps the (N, V) logits in bfloat16."""

    name = "liger-sm90"
    op: ClassVar[str] = "linear_cross_entropy"

    def missing(self, device: torch.device) -> str | None:
        return super().missing(device) or absent("cutlass", "nvidia-cutlass-dsl") or hopper(device)

    def refuses(self, op: str, problem: Problem, backward: bool) -> str | None:
        if problem.hidden.dtype != torch.bfloat16:
            return "bfloat16 only"
        return super().refuses(op, problem, backward)

    def build(self, op: str, problem: Problem) -> Run:
        from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (  # pyright: ignore
            LigerFusedLinearCrossEntropySM90Function,
        )

        return lambda: {
            "loss": LigerFusedLinearCrossEntropySM90Function.apply(
                problem.hidden, problem.weight, problem.target, IGNORE_INDEX, "mean"
            )
        }


class LigerScaled(RowProvider):
    """Per-token loss and entropy: CuTe on Hopper, chunks of 512 rows in plain torch elsewhere."""

    name = "liger-scaled"
    has_entropy: ClassVar[bool] = True

    def version(self) -> str:
        return package_version("liger-kernel")

    def missing(self, device: torch.device) -> str | None:
        reason = absent("liger_kernel", "liger-kernel")
        if reason is None and device.type == "cuda" and hopper(device) is None:
            return absent("cutlass", "nvidia-cutlass-dsl")
        return reason

    def rows(self, problem: Problem) -> Run:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (  # pyright: ignore
            LigerFusedLinearScaledCrossEntropyFunction,
        )

        def run() -> dict[str, Tensor]:
            nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
                *(problem.hidden, problem.weight, problem.target, 1.0, IGNORE_INDEX, 1, True)
            )
            return {"logprobs": -nll, "entropy": entropy.float()}

        return run


class LigerGRPO(_Liger):
    """The chunked GRPO loss without its KL term, all rows in one chunk of one-token sequences.

    That mapping is the one in which it takes an advantage for each token, and the largest chunk.
    """

    name = "liger-grpo"
    op: ClassVar[str] = "linear_ppo_loss"

    def build(self, op: str, problem: Problem) -> Run:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # pyright: ignore

        num_rows = problem.shape.num_rows
        loss = LigerFusedLinearGRPOLoss(
            beta=0.0,
            compiled=problem.device.type == "cuda",
            use_ref_model=False,
            chunk_size=num_rows,
            epsilon_low=problem.clip,
            epsilon_high=problem.clip,
            loss_type="bnpo",
        )
        target, mask = problem.safe_target[:, None], problem.live_mask[:, None]
        old_logprobs, advantages = problem.old_logprobs[:, None], problem.advantages

        def run() -> dict[str, Tensor]:
            made = loss(
                *(problem.hidden[:, None], problem.weight, target, mask, advantages),
                old_per_token_logps=old_logprobs,
            )
            return {"loss": made[0]}

        return run
