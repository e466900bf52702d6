"""Where an operation's time goes: milliseconds by kernel, one case for each operation and shape.

The profiler's sums over some calls of forward and backward, as in training; beside them the time of
the calls by the device's clock, so that what no kernel fills (`gap_ms`) shows: launches, waits for
the host. On a CPU the same with torch's operators in place of kernels.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Case, Figures, NotRun, cases_of, parser
from benchmarks.definitions import VOCABULARY_OPS
from benchmarks.measure import outputs_and_gradients
from benchmarks.problems import Problem, normal_problem
from benchmarks.products import BOTH, modes_of, num_products, product_flops
from benchmarks.providers.ours import Ours
from benchmarks.shapes import Shape, parse_shapes
from benchmarks.timing import time_in_turns

_CALLS = 5
# The shortest make up less than a hundredth of any call.
_KERNELS = 12


def kernel_times(op: str, shape: Shape, impl: str, device: torch.device) -> Figures:
    """call_ms: median of a call. kernels: name -> milliseconds a call, the longest first."""
    problem = _problem(shape, device)
    provider = Ours(impl)
    backward = BOTH in modes_of(op)
    reason = provider.refuses(op, problem, backward)
    if reason is not None:
        raise NotRun(reason)
    run = provider.build(op, problem)

    def call() -> object:
        return outputs_and_gradients(run, problem, backward, checked=False)

    times = time_in_turns({"it": call}, device, 0.5, (3, 20))["it"]
    by_kernel = _profiled(call, device)
    if not by_kernel:
        raise NotRun("the profiler saw no kernel")
    total, median = sum(by_kernel.values()), statistics.median(times)
    longest = sorted(by_kernel.items(), key=lambda item: -item[1])[:_KERNELS]
    count = num_products(op, modes_of(op)[-1])
    return {
        "call_ms": median,
        "kernels_ms": total,
        "gap_ms": median - total,
        "tflops": product_flops(problem, count) / median * 1e-9,
        "kernels": dict(longest),
    }


@functools.lru_cache(maxsize=1)
def _problem(shape: Shape, device: torch.device) -> Problem:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return normal_problem(shape, dtype, device)


def _profiled(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds a call of every kernel, by its name."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(_CALLS):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent > 0:
            found[event.key[:120]] = spent / _CALLS * 1e-3
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--shapes", nargs="+", required=True)
    made.add_argument("--impl", default="triton")
    options = made.parse_args(arguments)
    device = torch.device(options.device)
    cases: list[Case] = [
        (f"{op} {shape.name}", functools.partial(kernel_times, op, shape, options.impl, device))
        for shape in parse_shapes(options.shapes)
        for op in VOCABULARY_OPS
    ]
    return cases_of(options).run_all(cases)


if __name__ == "__main__":
    raise SystemExit(main())
