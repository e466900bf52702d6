"""token_rewards against padded PyTorch and a copy of its bytes; run with `make bench`."""

from typing import Any

from benchmarks.microbench import sequence_cases, time_sequences
from benchmarks.shapes import SequenceShape


@sequence_cases()
def bench_token_rewards(benchmark: Any, shape: SequenceShape, provider: str) -> None:
    time_sequences(benchmark, "token_rewards", shape, provider)
