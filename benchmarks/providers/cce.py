"""Cut Cross Entropy (apple/ml-cross-entropy): its default, and the variant without filter."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.problems import IGNORE_INDEX, Problem
from benchmarks.providers.base import (
    OUTPUTS,
    RowProvider,
    Run,
    absent,
    cuda_only,
    package_version,
)


class CutCrossEntropy(RowProvider):
    """Skips backward tiles of small softmax and sums gradients in the inputs' dtype."""

    name = "cce"
    impl: ClassVar[str] = "cce"
    has_entropy: ClassVar[bool] = False

    def version(self) -> str:
        return package_version("cut-cross-entropy")

    def missing(self, device: torch.device) -> str | None:
        return absent("cut_cross_entropy", "cut-cross-entropy") or cuda_only(device)

    def build(self, op: str, problem: Problem) -> Run:
        if op != "linear_cross_entropy":
            return super().build(op, problem)
        call = self._call(problem, "mean")
        return lambda: {OUTPUTS[op][0]: call()}

    def rows(self, problem: Problem) -> Run:
        call = self._call(problem, "none")
        return lambda: {"logprobs": -call()}

    def _call(self, problem: Problem, reduction: str) -> Callable[[], Tensor]:
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore

        def run() -> Tensor:
            return linear_cross_entropy(
                *(problem.hidden, problem.weight, problem.target),
                ignore_index=IGNORE_INDEX,
                reduction=reduction,
                impl=self.impl,
            )

        return run


class CutCrossEntropyExact(CutCrossEntropy):
    """No filter, float32 sums; in releases after 25.1.1 only."""

    name = "cce-exact"
    impl: ClassVar[str] = "cce_exact"

    def missing(self, device: torch.device) -> str | None:
        reason = super().missing(device)
        if reason is not None:
            return reason
        from cut_cross_entropy import LinearCrossEntropyImpl  # pyright: ignore

        names = {member.name.lower() for member in LinearCrossEntropyImpl}
        return None if self.impl in names else f"this release has no impl {self.impl!r}"
