"""The vocabulary operations in Triton: on GPUs of compute capability 8.0 and later.

tiles: a tile of logits and the monoid of statistics. forward, merge, backward, sample, hopper:
kernels. configs: their shapes. problem, launch, launch_backward: from a head to a grid. engine: the
orders of a loss with its gradients; stored_order: the one that stores exponentials; products: dense
ones. benchmarks/resources compiles everything that can be launched without a GPU.

With TRITON_INTERPRET=1 in the environment before triton is imported, the kernels run on CPU tensors
in Triton's interpreter: for tests, in float16, float32 and float64.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util


def register() -> dict[str, str | None]:
    """Register the engine for CUDA tensors, and under the interpreter for CPU tensors.

    ImportError, with the reason, without triton or with one older than 3.6; otherwise nothing is
    missing.
    """
    if importlib.util.find_spec("triton") is None:
        raise ImportError("the triton package is not installed")
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 6):
        raise ImportError(f"triton 3.6 or later is needed, got {version}")

    from s2srm_kernels.dispatch import implement
    from s2srm_kernels.triton.engine import TritonEngine
    from s2srm_kernels.triton.problem import INTERPRETED

    engine = TritonEngine()
    implement("triton", "CUDA", engine)
    if INTERPRETED:
        implement("triton", "CPU", engine)
    return {}
