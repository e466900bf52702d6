"""Times in turns and peak memory, on a CPU and on a GPU.

Every round calls each provider once, in an order that rotates, so that a machine that slows down
slows all of them. Left out: flushing the caches between calls; at the shapes that matter no input
fits in one.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

Call = Callable[[], object]

_SHORT_S = 1e-3
_MAX_INNER = 50
_SLOW, _SLOW_ROUNDS = 5.0, 2


def time_in_turns(
    calls: Mapping[str, Call], device: torch.device, seconds: float, rounds: tuple[int, int]
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round that it took part in, from the first on.

    As many rounds as fit in `seconds`, within `rounds` = (least, most). Each call is warmed up
    first. A call shorter than a millisecond is repeated within its turn and its mean taken; one
    that is far slower than the others and would use up the time takes part in two rounds.
    """
    estimates = {}
    for name, call in calls.items():
        call()
        estimates[name] = _elapsed_s(call, device, 1)
    inner = {n: min(_MAX_INNER, max(1, round(_SHORT_S / s))) for n, s in estimates.items()}
    usual = statistics.median_low(estimates.values())
    slow = {n for n, s in estimates.items() if s > _SLOW * usual and s * rounds[0] > seconds / 2}
    cost = sum(estimates[name] * inner[name] for name in calls if name not in slow)
    count = min(rounds[1], max(rounds[0], int(seconds / max(cost, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(count):
        names = [name for name in calls if name not in slow or index < _SLOW_ROUNDS]
        first = index % len(names)
        for name in names[first:] + names[:first]:
            elapsed = _elapsed_s(calls[name], device, inner[name])
            times[name].append(elapsed / inner[name] * 1e3)
    return times


def _elapsed_s(call: Call, device: torch.device, repeats: int) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - start
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def kernel_ms(call: Call, device: torch.device, repeats: int = 20) -> float | None:
    """Mean time that the call's kernels run on the GPU, launches and gaps left out.

    What a short operation costs inside a trainer that queues ahead. None on a CPU, and where the
    profiler sees no kernel.
    """
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize(device)
    total_us = sum(event.self_device_time_total for event in profiler.key_averages())
    return total_us / repeats * 1e-3 if total_us else None


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80; the value itself where there is one."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def peak_extra_bytes(call: Call, device: torch.device) -> int:
    """Most memory in use during the call above what was in use before it, results included.

    On a GPU: the allocator's count. On a CPU: resident memory of the process; free memory goes back
    to the system first, since reusing it would look like using none. Call it once before.
    """
    # The young generations: a full collection takes half a second beside torch's compiler.
    gc.collect(1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    _trim_heap()
    with _resident_peak() as peak:
        before = status_bytes("VmRSS")
        result = call()
    del result
    return max(0, peak() - before)


@contextmanager
def _resident_peak():
    """Yields a function that gives the most resident bytes since the start of the block.

    The kernel keeps that figure and lets it be reset; where it does not, a thread samples.
    """
    if _reset_high_water_mark():
        yield lambda: status_bytes("VmHWM")
        return
    stop = threading.Event()
    most = [status_bytes("VmRSS")]

    def sample() -> None:
        while not stop.wait(1e-3):
            most[0] = max(most[0], status_bytes("VmRSS"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        stop.set()
        thread.join()


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return status_bytes("VmHWM") - status_bytes("VmRSS") < 2**20


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: resident memory needs Linux")


def _trim_heap() -> None:
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
