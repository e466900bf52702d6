"""The order in which rows are visited: the same on every rank, new in every epoch.

Left out: samplers with state. An epoch's order follows from (seed, epoch) alone, so a resumed run
only needs to know the step it had reached.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np


def num_steps(
    num_rows: int, batch_size: int, epochs: float = 1.0, max_steps: int | None = None
) -> int:
    """Number of batches that global_batches gives: max_steps, else ceil(epochs * batches in one).

    ValueError for anything that would give no step.
    """
    for name, value in (("num_rows", num_rows), ("batch_size", batch_size), ("epochs", epochs)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if max_steps is not None:
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}")
        return max_steps
    # 1.1 * 10 is 11.000000000000002, which must not become a twelfth step.
    return max(1, math.ceil(epochs * math.ceil(num_rows / batch_size) - 1e-9))


def global_batches(
    num_rows: int,
    batch_size: int,
    seed: int,
    epochs: float = 1.0,
    max_steps: int | None = None,
) -> Iterator[list[int]]:
    """Row indices of every optimiser step, over all ranks together.

    Each epoch visits every row once, in an order that follows from (seed, epoch). Its last batch
    may be smaller and is kept. max_steps, when given, decides alone, over as many epochs as needed.
    """
    steps = num_steps(num_rows, batch_size, epochs, max_steps)
    return itertools.islice(_endless(num_rows, batch_size, seed), steps)


def _endless(num_rows: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    for epoch in itertools.count():
        # numpy mixes the pair, so that (0, 1) and (1, 0) give unrelated orders; it takes no
        # negative number, torch does.
        order = np.random.default_rng((seed % 2**64, epoch)).permutation(num_rows).tolist()
        for start in range(0, num_rows, batch_size):
            yield order[start : start + batch_size]
