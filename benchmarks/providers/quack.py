"""QuACK (Dao-AILab): chunked linear cross-entropy of its CuTe kernels."""

from __future__ import annotations

import torch

from benchmarks.problems import IGNORE_INDEX, Problem
from benchmarks.providers.base import Provider, Run, absent, cuda_only, package_version, plain_head


class Quack(Provider):
    """Chunks of 4096 rows, its default; mean reduction, no entropy."""

    name = "quack"

    def version(self) -> str:
        return package_version("quack-kernels")

    def missing(self, device: torch.device) -> str | None:
        return (
            absent("quack", "quack-kernels")
            or absent("cutlass", "nvidia-cutlass-dsl")
            or cuda_only(device)
        )

    def refuses(self, op: str, problem: Problem, backward: bool) -> str | None:
        if op != "linear_cross_entropy":
            return "has the cross-entropy only"
        if problem.shape.num_rows % 8 or problem.shape.vocab_size % 8:
            return "rows and vocabulary must be multiples of 8"
        return plain_head(problem)

    def build(self, op: str, problem: Problem) -> Run:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy  # pyright: ignore

        return lambda: {
            "loss": chunked_linear_cross_entropy(
                *(problem.hidden, problem.weight, problem.target),
                ignore_index=IGNORE_INDEX,
                reduction="mean",
            )
        }
