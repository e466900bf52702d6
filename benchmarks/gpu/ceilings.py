"""The two ceilings of the machine: a large bf16 product and a large copy, and what lies between.

Measured on random data, since zeros are faster, and on buffers that are several times the cache.
The product that adds to a float32 sum is what the weight's gradient is made with.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.cases import Figures, NotRun, cases_of, parser
from benchmarks.timing import quantiles, time_in_turns

_SECONDS, _ROUNDS = 1.0, (5, 40)


def product(size: int, dtype: torch.dtype, device: torch.device, sums: bool = False) -> Figures:
    """TFLOP/s of size x size x size; with `sums` added to a float32 matrix."""
    if sums and device.type != "cuda":
        raise NotRun("torch has it on a GPU alone")
    if sums and not _adds_mixed(device, dtype):
        raise NotRun(f"torch {torch.__version__} does not add such a product to a sum")
    left, right = (_random(size, dtype, device) for _ in range(2))
    if sums:
        total = torch.zeros(size, size, device=device)
        times = _times(
            lambda: torch.addmm(total, left, right, out_dtype=torch.float32, out=total), device
        )
    else:
        made = torch.empty_like(left)
        times = _times(lambda: torch.mm(left, right, out=made), device)
    return {"tflops": 2.0 * size**3 / statistics.median(times) * 1e-9, **_quantiles(times)}


def _adds_mixed(device: torch.device, dtype: torch.dtype) -> bool:
    from s2srm_kernels.triton.products import adds_mixed

    return adds_mixed(device, dtype)


def copy(size_bytes: int, device: torch.device) -> Figures:
    """GB/s of a device copy, bytes read and written together."""
    source = torch.randint(127, (size_bytes,), dtype=torch.int8, device=device)
    destination = torch.empty_like(source)
    times = _times(lambda: destination.copy_(source), device)
    return {"gb_per_s": 2 * size_bytes / statistics.median(times) * 1e-6, **_quantiles(times)}


def _random(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(size, size, device=device).to(dtype)


def _times(call: Callable[[], object], device: torch.device) -> list[float]:
    return time_in_turns({"it": call}, device, _SECONDS, _ROUNDS)["it"]


def _quantiles(times: Sequence[float]) -> Figures:
    return dict(zip(("p20_ms", "p50_ms", "p80_ms"), quantiles(times), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--tiny", action="store_true")
    options = made.parse_args(arguments)
    device = torch.device(options.device)
    size, size_bytes = (128, 2**20) if options.tiny else (8192, 2**31)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    cube = f"{size}x{size}x{size}"
    return cases_of(options).run_all(
        [
            (f"{name} product {cube}", functools.partial(product, size, dtype, device)),
            (f"copy of {size_bytes // 2**20} MiB", functools.partial(copy, size_bytes, device)),
            (
                f"bfloat16 product {cube} added to a float32 sum",
                functools.partial(product, size, torch.bfloat16, device, sums=True),
            ),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
