"""linear_cross_entropy against eager PyTorch and bare products; run with `make bench`."""

from typing import Any

from benchmarks.microbench import time_vocabulary, vocabulary_cases
from benchmarks.shapes import Shape


@vocabulary_cases("linear_cross_entropy")
def bench_linear_cross_entropy(benchmark: Any, shape: Shape, mode: str, provider: str) -> None:
    time_vocabulary(benchmark, "linear_cross_entropy", shape, mode, provider)
