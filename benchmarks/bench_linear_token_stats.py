"""linear_token_stats against eager PyTorch and bare products; run with `make bench`."""

from typing import Any

from benchmarks.microbench import time_vocabulary, vocabulary_cases
from benchmarks.shapes import Shape


@vocabulary_cases("linear_token_stats")
def bench_linear_token_stats(benchmark: Any, shape: Shape, mode: str, provider: str) -> None:
    time_vocabulary(benchmark, "linear_token_stats", shape, mode, provider)
