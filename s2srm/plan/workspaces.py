"""Memory that an operator takes and gives back within itself, which no trace sees.

Formulas follow s2srm_kernels (cpp/_engine.py, triton/_engine.py) and rollout/hf.py. N rows meet a
head of V x D; itemsize is that of the weights.
"""

from __future__ import annotations

CPU_BYTES = 48 * 2**20
"""s2srm_kernels.cpp.engine.WORKSPACE_BYTES."""
GPU_BYTES = 4 * 2**30
"""s2srm_kernels.triton.engine.WORKSPACE_BYTES."""
GPU_COLUMN_BYTES = 256 * 2**20
"""s2srm_kernels.triton.engine.GRADIENT_CHUNK_BYTES."""
_REFERENCES = 1 / 8
"""Bytes of references beside one stored exponential: a float32 for 32 columns."""


def head_training(rows: int, vocabulary: int, hidden: int, itemsize: int, on_gpu: bool) -> float:
    """Chunks of logits of a loss with gradients: at most a constant, whatever rows and vocabulary.

    CPU: float32 logits, at most CPU_BYTES. GPU: exponentials in the weights' type beside the
    float32 sum of the weight's gradient, together at most GPU_BYTES; where fewer than 2048 rows fit
    beside the sum, a column chunk of GPU_COLUMN_BYTES.
    """
    if not on_gpu:
        return min(CPU_BYTES, 4.0 * rows * vocabulary)
    row_bytes = vocabulary * (itemsize + _REFERENCES)
    room = GPU_BYTES - 4 * vocabulary * hidden
    if room < min(2048, rows) * row_bytes:
        return min(GPU_COLUMN_BYTES, rows * vocabulary * itemsize)
    return min(room, rows * row_bytes)


def sampling(sequences: int, vocabulary: int) -> float:
    """A draw holds three (B, V) float32 tensors: scores, weights and the result, and the sums of
    groups of 32 weights (rollout/sampling.py)."""
    return (3 + 1 / 32) * 4.0 * sequences * vocabulary
