"""Memory that a step frees stays with the process, for the next step.

glibc gives every block above 32 MiB back to the system when it is freed, so each step maps its
gradients and large activations anew and the system clears them page by page. Left out: other C
libraries, and GPUs, whose memory torch keeps by itself.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@cache
def keep_freed_memory() -> None:
    """For the whole process, from now on; does nothing without glibc's mallopt."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Once: what loading a model has freed, up to another copy of it, goes back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
