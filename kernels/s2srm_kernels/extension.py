"""Loads the compiled libraries, which register kernels for `s2srm::X.cpp` as they load.

_C.so has the CPU's kernels, _C_cuda.so CUDA's; csrc/ has their sources, csrc/build.py builds them.
Left out: building at the first import. It would need a compiler where the program runs, and hide
half a minute in somebody's first call.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent
_SOURCES = _PACKAGE.parents[1] / "csrc"  # there in a checkout, not in an installed wheel
_BUILD = "build it with `python csrc/build.py` in the checkout of s2srm"


@functools.cache
def load() -> None:
    """Register every compiled kernel; again, do nothing.

    For s2srm_kernels.cpp.register, after the operators' overloads are defined. ImportError with the
    reason and the remedy if the CPU's library is missing, older than its sources or does not load.
    Trouble with CUDA's is a warning, and only where there is a GPU: the CPU's kernels do not need
    it.
    """
    _load("_C.so", ("*.cpp", "cpu/*.cpp", "*.h", "cpu/*.h"))
    if not torch.cuda.is_available():
        return
    try:
        _load("_C_cuda.so", ("*.cu", "*.cuh", "*.h"))
    except ImportError as error:
        warnings.warn(
            f"gae and token_rewards run on their PyTorch reference on CUDA: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


def _load(name: str, patterns: tuple[str, ...]) -> None:
    library = _PACKAGE / name
    if not library.exists():
        raise ImportError(f"{library} does not exist; {_BUILD}")
    built = library.stat().st_mtime
    sources = [source for pattern in patterns for source in _SOURCES.glob(pattern)]
    newer = sorted(source.name for source in sources if source.stat().st_mtime > built)
    if newer:
        raise ImportError(f"{library} is older than csrc/{newer[0]}; {_BUILD}")
    try:
        torch.ops.load_library(library)  # pyright: ignore[reportUnknownMemberType]
    except OSError as error:
        reason = error.__cause__ or error  # torch wraps what the loader said
        raise ImportError(f"{library} does not load: {reason}; {_BUILD}") from error
