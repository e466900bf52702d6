"""gae against padded PyTorch and a copy of its bytes; run with `make bench`."""

from typing import Any

from benchmarks.microbench import sequence_cases, time_sequences
from benchmarks.shapes import SequenceShape


@sequence_cases()
def bench_gae(benchmark: Any, shape: SequenceShape, provider: str) -> None:
    time_sequences(benchmark, "gae", shape, provider)
