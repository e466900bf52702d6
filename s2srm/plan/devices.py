"""Devices: what their makers state, and the efficiencies that a plan assumes.

Peaks are the makers' data sheets, dense, without sparsity. Efficiencies are assumptions, not
measurements of this project: they belong to each plan's output and can be wrong by a factor of two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One device of a rank.

    flops       peak of dense bfloat16 products, floating-point operations a second
    flops32     the same in float32 (TF32 is off in torch by default)
    bandwidth   of its memory, bytes a second
    link        between devices of one node, bytes a second in each direction
    memory      bytes
    context     bytes of a CUDA context and libraries; ranks: of NCCL's buffers, with several ranks
    """

    name: str
    flops: float
    flops32: float
    bandwidth: float
    link: float
    memory: float
    context: float = 0.6 * GIB
    ranks: float = 1.0 * GIB
    reserve: float = 0.04
    """Share of what is allocated that the caching allocator loses to rounding and fragments."""
    is_cpu: bool = False


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that a phase is assumed to reach.

    train, infer  of the peak of products
    decode        of the memory's bandwidth
    link          of the link between devices
    launch_s      seconds a layer of a decoding step takes at least: transformers launches every
                  operator from Python
    """

    train: float = 0.4
    infer: float = 0.5
    decode: float = 0.6
    link: float = 0.7
    launch_s: float = 5e-4


DEVICES = {
    "h100": Device("H100 SXM 80 GB", 989e12, 67e12, 3.35e12, 450e9, 79.1 * GIB),
    "h200": Device("H200 SXM 141 GB", 989e12, 67e12, 4.8e12, 450e9, 139.7 * GIB),
    "a100": Device("A100 SXM 80 GB", 312e12, 19.5e12, 2.04e12, 300e9, 79.1 * GIB),
}
NODE_LINK = 50e9
"""Bytes a second and direction between nodes for each GPU: one 400 Gbit/s adapter."""


def this_cpu(ranks: int) -> Device:
    """The processor here, shared by the ranks: its rate of float32 products and its bandwidth are
    measured, in a fifth of a second."""
    import torch

    matrix = torch.randn(768, 768)
    rate = _rate(lambda: torch.mm(matrix, matrix), 2 * 768.0**3)
    source, target = torch.ones(2**23), torch.empty(2**23)
    bandwidth = _rate(lambda: target.copy_(source), 2 * 4.0 * 2**23)
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = int(file.readline().split()[1]) * 1024 / ranks
    return Device(
        name="this CPU",
        flops=rate,
        flops32=rate,
        bandwidth=bandwidth,
        link=bandwidth,
        memory=memory,
        context=0,
        ranks=0,
        reserve=0,
        is_cpu=True,
    )


def _rate(call: Callable[[], object], amount: float) -> float:
    """amount / second of the fastest of some calls."""
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return amount / best
