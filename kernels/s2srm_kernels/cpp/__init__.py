"""The compiled kernels on the CPU: csrc/ behind s2srm::X.cpp.

_engine: the vocabulary operations, on csrc/cpu/. gae and token_rewards register themselves as the
library loads.
"""

from __future__ import annotations

from s2srm_kernels.extension import load


def register() -> None:
    """Load the compiled library and register the engine for CPU tensors.

    ImportError, with the reason and the remedy, where it is not built.
    """
    load()

    from s2srm_kernels.cpp.engine import CppEngine
    from s2srm_kernels.dispatch import implement

    implement("cpp", "CPU", CppEngine())
