"""What the C library does with memory that a step frees, on a CPU.

glibc gives every block above 32 MiB back to the system when it is freed, so each step maps its
gradients and large activations anew and the system clears them page by page. Left out: other C
libraries, and GPUs, whose memory torch keeps by itself.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_LARGE_BYTES = 2**20


@cache
def keep_freed_memory() -> None:
    """It stays with the process, for the next step; faster, and for a step that allocates the same
    blocks each time no larger. For the whole process, from now on; nothing without glibc."""
    _set_options((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))


@cache
def map_large_blocks() -> None:
    """Blocks above a MiB come from the system and go back to it: slower, and nothing is lost in
    holes, where buffers of all sizes come and go as under ZeRO. As `keep_freed_memory`."""
    _set_options((_M_MMAP_THRESHOLD, _LARGE_BYTES))


def _set_options(*options: tuple[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in options:
            mallopt(option, value)


def give_back_freed_memory() -> None:
    """Once: what loading a model has freed, up to another copy of it, goes back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
