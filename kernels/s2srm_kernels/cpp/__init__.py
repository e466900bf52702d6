"""The compiled kernels of csrc/ behind s2srm::X.cpp, for CPU and CUDA tensors.

engine: the vocabulary operations on the CPU, on csrc/lm_head/. gae and token_rewards register
themselves, on either device, as their library loads.
"""

from __future__ import annotations

from s2srm_kernels.extension import load


def register() -> dict[str, str | None]:
    """Load the compiled libraries and register the engine for CPU tensors.

    Returns, by type of device, why its library is not used, or None; ImportError with the reasons
    where none is.
    """
    reasons = load()
    refused = [reason for reason in reasons.values() if reason is not None]
    if len(refused) == len(reasons):
        raise ImportError("; ".join(refused))
    if reasons["cpu"] is None:
        from s2srm_kernels.cpp.engine import CppEngine
        from s2srm_kernels.dispatch import implement

        implement("cpp", "CPU", CppEngine())
    return reasons
