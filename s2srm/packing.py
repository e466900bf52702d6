"""The one data format from tokenisation to gradients: sequences laid end to end.

A `Segment` is one tokenised sequence with the span of it that is predicted (the response, or the
RM's output). `pack` lays segments end to end in a `Packed` batch; nothing is padded. Positions
restart at every sequence. Only the rows in `rows` meet the LM head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """One sequence of token ids; the ids `tokens[start:]` are predicted, each from its prefix.

    weight multiplies the loss of every predicted token of the sequence.
    """

    tokens: Sequence[int]
    start: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.start < len(self.tokens):
            raise ValueError(
                f"start must lie in [1, {len(self.tokens) - 1}] so that at least one token is "
                f"predicted from a prefix, got {self.start}"
            )

    @property
    def num_predicted(self) -> int:
        """Number of predicted tokens."""
        return len(self.tokens) - self.start


@dataclass(frozen=True)
class Packed:
    """B sequences of T tokens in all, of which N are predicted.

    tokens      (T,) int64
    positions   (T,) int64, restarting at 0 in every sequence
    cu_seqlens  (B+1,) int32: sequence b is tokens[cu_seqlens[b]:cu_seqlens[b+1]]
    rows        (N,) int64: index into tokens of the position that predicts targets[i]
    targets     (N,) int64: tokens[rows + 1]
    cu_rows     (B+1,) int32: rows of sequence b are cu_rows[b]:cu_rows[b+1]
    weights     (N,) float32: loss weight of each row
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    rows: Tensor
    targets: Tensor
    cu_rows: Tensor
    weights: Tensor

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.cu_seqlens.numel() - 1

    @property
    def last(self) -> Tensor:
        """(B,) int64: index into tokens of every sequence's last token."""
        return self.cu_seqlens[1:].long() - 1

    def to(self, device: torch.device | str) -> Packed:
        """The same batch on another device."""
        return Packed(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def pack(segments: Sequence[Segment]) -> Packed:
    """Lay segments end to end. At least one segment; order is kept."""
    if not segments:
        raise ValueError("segments is empty: a packed batch holds at least one sequence")
    lengths = torch.tensor([len(s.tokens) for s in segments])
    predicted = torch.tensor([s.num_predicted for s in segments])
    cu_seqlens = _cumulative(lengths)
    tokens = torch.cat([torch.as_tensor(s.tokens, dtype=torch.int64) for s in segments])
    positions = torch.cat([torch.arange(len(s.tokens)) for s in segments])
    rows = torch.cat(
        [
            torch.arange(s.start - 1, len(s.tokens) - 1) + int(offset)
            for s, offset in zip(segments, cu_seqlens[:-1], strict=True)
        ]
    )
    weights = torch.tensor([s.weight for s in segments], dtype=torch.float32)
    return Packed(
        tokens=tokens,
        positions=positions,
        cu_seqlens=cu_seqlens,
        rows=rows,
        targets=tokens[rows + 1],
        cu_rows=_cumulative(predicted),
        weights=weights.repeat_interleave(predicted),
    )


def split_by_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group indices 0..len(lengths)-1 into bins of at most `budget` tokens each.

    First-fit decreasing, deterministic; a sequence longer than the budget gets a bin of its own.
    Indices inside a bin, and bins by their first index, are in ascending order.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, got {budget}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        for b, free in enumerate(room):
            if lengths[i] <= free:
                bins[b].append(i)
                room[b] -= lengths[i]
                break
        else:
            bins.append([i])
            room.append(budget - lengths[i])
    return sorted(sorted(b) for b in bins)


def split_rows(values: Tensor, cu_rows: Tensor) -> list[Tensor]:
    """Cut a flat (N, ...) tensor into one tensor for each sequence."""
    return list(values.split((cu_rows[1:] - cu_rows[:-1]).tolist()))


def rows_of(cu_rows: Tensor, sequences: Sequence[int]) -> Tensor:
    """Index of the rows of some sequences, in the order given: (sum of their lengths,) int64."""
    offsets = cu_rows.tolist()
    parts = [torch.arange(offsets[i], offsets[i + 1]) for i in sequences]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _cumulative(lengths: Tensor) -> Tensor:
    """(B,) lengths -> (B+1,) int32 offsets."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
