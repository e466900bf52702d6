"""Packed sequences: rows of sequence b are cu_seqlens[b]:cu_seqlens[b+1]."""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from s2srm_kernels.checks import check_device, check_integer


def check_cu_seqlens_shape(cu_seqlens: Tensor, rows: Tensor, rows_name: str) -> None:
    """What can be seen without the data."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    check_integer("cu_seqlens", cu_seqlens)
    check_device("cu_seqlens", cu_seqlens, rows, rows_name)


class Segments(NamedTuple):
    """start, end (B,) int64; sequence, position (N,) int64; longest: rows of the longest one."""

    start: Tensor
    end: Tensor
    sequence: Tensor
    position: Tensor
    longest: int


def find_segments(cu_seqlens: Tensor, num_rows: int) -> Segments:
    """ValueError unless cu_seqlens starts at 0, ascends and ends at num_rows.

    On CUDA one synchronisation for all of it.
    """
    offsets = cu_seqlens.long()
    lengths = offsets.diff()
    descends = lengths < 0
    zero = offsets.new_zeros(1)
    facts: list[int] = torch.stack(
        [
            offsets[0],
            offsets[-1],
            descends.sum(),
            torch.cat([descends.byte(), zero.byte()]).argmax(),
            torch.cat([lengths, zero]).amax(),
        ]
    ).tolist()
    first, last, num_descents, at, longest = facts
    if first != 0:
        raise ValueError(f"cu_seqlens must start at 0, got cu_seqlens[0] = {first}")
    if num_descents:
        raise ValueError(
            f"cu_seqlens must be ascending, got cu_seqlens[{at}] = {int(offsets[at])} > "
            f"cu_seqlens[{at + 1}] = {int(offsets[at + 1])}"
        )
    if last != num_rows:
        raise ValueError(
            f"cu_seqlens must end at the number of rows {num_rows}, got cu_seqlens[-1] = {last}"
        )
    sequence = torch.repeat_interleave(lengths, output_size=num_rows)
    position = torch.arange(num_rows, device=offsets.device)
    return Segments(offsets[:-1], offsets[1:], sequence, position, longest)
