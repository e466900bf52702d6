"""Loads the compiled libraries, which register kernels for `s2srm::X.cpp` as they load.

_C.so has the kernels for CPU tensors, _C_cuda.so those for CUDA tensors; neither needs the other.
csrc/ has their sources, csrc/build.py builds them.
Left out: building at the first import. It would need a compiler where the program runs, and hide
half a minute in somebody's first call.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent
_SOURCES = _PACKAGE.parents[1] / "csrc"  # there in a checkout, not in an installed wheel
_BUILD = "build it with `python csrc/build.py` in the checkout of s2srm"
# By type of device: the library, and what it is compiled from.
_LIBRARIES = {
    "cpu": ("_C.so", ("**/*.cpp", "**/*.h")),
    "cuda": ("_C_cuda.so", ("*.cu", "*.cuh", "*.h")),
}


@functools.cache
def load() -> dict[str, str | None]:
    """Register every compiled kernel; again, do nothing.

    For s2srm_kernels.cpp.register, after the operators' overloads are defined. Returns for "cpu",
    and for "cuda" where there is a GPU, why the library is not used: it is missing, older than its
    sources or does not load, with the remedy. None where all is well.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {device: _load(*_LIBRARIES[device]) for device in devices}


def _load(name: str, patterns: tuple[str, ...]) -> str | None:
    """The reason where the library cannot be used, else None."""
    library = _PACKAGE / name
    if not library.exists():
        return f"{library} does not exist; {_BUILD}"
    built = library.stat().st_mtime
    sources = [source for pattern in patterns for source in _SOURCES.glob(pattern)]
    newer = sorted(source for source in sources if source.stat().st_mtime > built)
    if newer:
        return f"{library} is older than csrc/{newer[0].relative_to(_SOURCES)}; {_BUILD}"
    try:
        torch.ops.load_library(library)  # pyright: ignore[reportUnknownMemberType]
    except OSError as error:
        reason = error.__cause__ or error  # torch wraps what the loader said
        return f"{library} does not load: {reason}; {_BUILD}"
    return None
