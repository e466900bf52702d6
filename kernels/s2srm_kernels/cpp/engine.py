"""The CPU's engine: shapes, buffers and the order of the passes; csrc/lm_head/ computes.

Nothing of size (R, V) is made. Kept logits lie column by column, as (V, rows): a chunk of rows in a
workspace of at most WORKSPACE_BYTES, or up to D rows in the memory of d_weight, which they leave as
its tiles are finished. float16 and bfloat16 are widened tile by tile.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s2srm_kernels.checks import compute_dtype
from s2srm_kernels.lm_head.backward import scale_on_host_
from s2srm_kernels.lm_head.engine import (
    ALL,
    SKIP_COLUMNS,
    Draws,
    Entries,
    RowStatistics,
    ThreeGradients,
    Upstream,
    UpstreamOf,
    Wanted,
)
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.noise import Noise
from s2srm_kernels.lm_head.statistics import merge

WORKSPACE_BYTES = 48 * 2**20
# With fewer rows in a chunk the weight is read too often: making the logits twice is faster.
_MIN_CHUNK_ROWS = 32
_PANEL_ROWS = 64
_ROW_PADDING = 16
_MAX_SPAN_COLUMNS = 8192


class CppEngine:
    """`Engine` in C++ on the CPU. The results do not depend on the number of threads."""

    def target_logits(self, head: Head, columns: Tensor | None = None) -> Tensor:
        problem = _Problem(head)
        if columns is None:
            out = problem.empty(head.num_live)
            torch.ops.s2srm.cpu_target_logits(*problem.arguments(), out)
            return out
        out = problem.empty(*columns.shape)
        rows = head.rows.repeat_interleave(columns.shape[1])
        hidden, _, weight, bias, _, *options = problem.arguments()
        torch.ops.s2srm.cpu_target_logits(
            *(hidden, rows, weight, bias, columns.flatten(), *options), out.view(-1)
        )
        return out

    def statistics(
        self,
        head: Head,
        target_logits: Tensor | None,
        tiles: bool,
        wanted: Wanted = ALL,
    ) -> tuple[Tensor, Tensor | None]:
        problem = _Problem(head)
        tile_lse = problem.empty(head.num_live, problem.num_tiles) if tiles else None
        packed = problem.statistics(slice(None), wanted, target_logits, tile_lse)
        return packed, tile_lse

    def sample(self, head: Head, noise: Noise | None, suppressed: Tensor | None) -> Draws:
        problem = _Problem(head)
        num_rows = head.num_live
        packed = problem.empty(num_rows, 7)
        perturbed, columns = problem.empty(num_rows), torch.empty_like(head.rows)
        torch.ops.s2srm.cpu_sample(
            *problem.arguments(),
            *(None, None) if noise is None else (part.contiguous() for part in noise),
            head.shard.offset,
            None if suppressed is None else suppressed.contiguous(),
            *(packed, perturbed, columns),
        )
        return Draws(perturbed, columns, packed)

    def gradients_in_forward(
        self, hidden: Tensor, weight: Tensor, workspace_bytes: int | None
    ) -> bool:
        rows = _chunk_rows(weight.shape[0], compute_dtype(hidden), workspace_bytes)
        in_place = workspace_bytes is None and hidden.shape[0] <= hidden.shape[1] - _ROW_PADDING
        return in_place or rows >= _MIN_CHUNK_ROWS

    def statistics_with_gradients(
        self,
        head: Head,
        upstream_of: UpstreamOf,
        needs: Sequence[bool],
        workspace_bytes: int | None,
        wanted: Wanted = ALL,
        proportional: bool = False,
    ) -> tuple[RowStatistics, ThreeGradients]:
        problem = _Problem(head)
        gradients = problem.buffers(needs, head.dtype)
        d_weight = gradients.weight
        in_place = 0 if d_weight is None else d_weight.shape[1] // _ROW_PADDING * _ROW_PADDING
        step = _chunk_rows(problem.weight.shape[0], head.dtype, workspace_bytes)
        if in_place < head.num_live and step < _MIN_CHUNK_ROWS:
            return self._statistics_then_gradients(problem, gradients, upstream_of, wanted)
        parts: list[RowStatistics] = []
        logits = None
        for rows in _chunks(head.num_live, in_place, step):
            if rows.stop <= in_place:
                logits = d_weight
            elif logits is None or logits is d_weight:
                logits = problem.logits(problem.weight.shape[0], rows.stop - rows.start)
            packed = problem.statistics(rows, wanted, logits=logits)
            part = merge(packed, head)
            upstream = upstream_of(part, rows)
            assert logits is not None
            problem.gradients(rows, part, upstream, None, gradients, logits, stored=True)
            parts.append(part)
        merged = RowStatistics(*(torch.cat(field) for field in zip(*parts, strict=True)))
        return merged, gradients.result(head)

    def _statistics_then_gradients(
        self, problem: _Problem, gradients: _Gradients, upstream_of: UpstreamOf, wanted: Wanted
    ) -> tuple[RowStatistics, ThreeGradients]:
        """Four products: not even a small chunk of logits can be kept."""
        rows = slice(0, problem.head.num_live)
        statistics = merge(problem.statistics(rows, wanted), problem.head)
        upstream = upstream_of(statistics, rows)
        problem.gradients(rows, statistics, upstream, None, gradients, problem.span_workspace())
        return statistics, gradients.result(problem.head)

    def gradients(
        self,
        head: Head,
        statistics: RowStatistics,
        upstream: Upstream,
        needs: Sequence[bool],
        live: Tensor | None,
        entries: Entries | None = None,
    ) -> ThreeGradients:
        problem = _Problem(head)
        dtype = head.hidden.dtype
        gradients = problem.buffers(needs, dtype)
        workspace = problem.span_workspace()
        rows = slice(0, head.num_live)
        problem.gradients(rows, statistics, upstream, live, gradients, workspace, entries=entries)
        d_hidden, d_weight, d_bias = gradients.result(head)
        if head.shard.group is None:
            d_hidden = d_hidden.to(dtype)
        return d_hidden, d_weight, d_bias.to(dtype)

    def scale_(self, gradients: Sequence[Tensor], factor: Tensor) -> None:
        scale_on_host_(gradients, factor)


class _Gradients(NamedTuple):
    """Buffers of a call, unset; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def result(self, head: Head) -> ThreeGradients:
        none = head.hidden.new_empty(0, dtype=head.dtype)
        d_hidden, d_weight, d_bias = (none.clone() if t is None else t for t in self)
        return d_hidden, d_weight, d_bias


class _Problem:
    """A head with tensors as csrc/lm_head takes them: rows of hidden and weight contiguous."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.hidden = _contiguous_rows(head.hidden)
        self.weight = _contiguous_rows(head.weight)
        self.bias = None if head.bias is None else head.bias.contiguous()
        self.num_tiles = -(-self.weight.shape[0] // SKIP_COLUMNS)

    def empty(self, *shape: int) -> Tensor:
        """Unset, in the compute dtype."""
        return self.weight.new_empty(shape, dtype=self.head.dtype)

    def logits(self, columns: int, num_rows: int) -> Tensor:
        """Room for the logits of num_rows rows.

        Columns an odd number of cache lines apart: a power of two would crowd a few cache sets.
        """
        blocks = -(-num_rows // _ROW_PADDING)
        return self.empty(columns, (blocks | 1) * _ROW_PADDING)

    def arguments(self, rows: slice = slice(None)) -> tuple[object, ...]:
        """The head of an operator s2srm::cpu_*, for a slice of the live rows."""
        head = self.head
        softcap = 0.0 if head.softcap is None else head.softcap
        target = head.columns[rows]
        return (
            *(self.hidden, head.rows[rows], self.weight, self.bias, target),
            *(softcap, head.temperature),
        )

    def statistics(
        self,
        rows: slice,
        wanted: Wanted,
        target_logits: Tensor | None = None,
        tile_lse: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> Tensor:
        """(r, 7); writes tile_lse, and to `logits` those of the rows."""
        arguments = self.arguments(rows)
        packed = self.empty(self.head.rows[rows].shape[0], 7)
        torch.ops.s2srm.cpu_statistics(
            *(*arguments, target_logits, wanted.entropy, wanted.mean, packed, tile_lse, logits)
        )
        return packed

    def buffers(self, needs: Sequence[bool], dtype: torch.dtype) -> _Gradients:
        """For d_weight of `dtype`; the others are in the compute dtype."""
        head = self.head
        every_row = head.num_live == head.hidden.shape[0]
        shape = tuple(head.hidden.shape)
        d_hidden = self.empty(*shape) if every_row else self.empty(0).new_zeros(shape)
        d_weight = head.weight.new_empty(head.weight.shape, dtype=dtype) if needs[1] else None
        d_bias = self.empty(self.weight.shape[0]) if needs[2] and self.bias is not None else None
        return _Gradients(d_hidden if needs[0] else None, d_weight, d_bias)

    def span_workspace(self) -> Tensor:
        """Room for the logits of all live rows in a span of columns."""
        num_rows = self.head.num_live
        columns = WORKSPACE_BYTES // (num_rows * self.head.dtype.itemsize)
        if columns >= SKIP_COLUMNS:
            columns = min(columns // SKIP_COLUMNS * SKIP_COLUMNS, _MAX_SPAN_COLUMNS)
        else:  # a divisor of SKIP_COLUMNS, so that a span lies within one block
            columns = 128 if columns >= 128 else 64
        return self.logits(columns, num_rows)

    def gradients(
        self,
        rows: slice,
        statistics: RowStatistics,
        upstream: Upstream,
        live: Tensor | None,
        gradients: _Gradients,
        logits: Tensor,
        stored: bool = False,
        entries: Entries | None = None,
    ) -> None:
        """Add the gradients of a slice of the live rows; of the first slice, set them.

        statistics and upstream: of these rows. logits: workspace, or with `stored` what
        `statistics` wrote to it.
        """
        entropy = statistics.entropy
        optional = (upstream.entropy, upstream.lse, upstream.mean_logprob)
        fields = [statistics.max_logit, statistics.log_sum, statistics.log_sum_low, entropy]
        fields += [upstream.logprobs]
        fields += [torch.zeros_like(entropy) if t is None else t for t in optional]
        given = sum(1 << i for i, t in enumerate(optional) if t is not None)
        torch.ops.s2srm.cpu_gradients(
            *self.arguments(rows),
            *(torch.stack(fields), given, self.head.shard.num_total),
            None if live is None else live.contiguous(),
            *(None, None) if entries is None else (part.contiguous() for part in entries),
            *(logits, stored, rows.start > 0),
            *gradients,
        )


def _contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[1] < 2 or tensor.stride(1) == 1 else tensor.contiguous()


def _chunk_rows(num_columns: int, dtype: torch.dtype, workspace_bytes: int | None) -> int:
    """Rows of logits that fit, whole panels if that is at least one."""
    bound = WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    rows = bound // (num_columns * dtype.itemsize)
    return rows if rows < _PANEL_ROWS else rows // _PANEL_ROWS * _PANEL_ROWS


def _chunks(num_rows: int, in_place: int, step: int) -> Iterator[slice]:
    """Slices of num_rows: the first of up to in_place rows if that is worth it, then up to step."""
    start = 0
    if num_rows <= in_place or in_place // _PANEL_ROWS * _PANEL_ROWS >= step:
        start = num_rows if num_rows <= in_place else in_place // _PANEL_ROWS * _PANEL_ROWS
        yield slice(0, start)
    while start < num_rows:
        stop = min(start + step, num_rows)
        yield slice(start, stop)
        start = stop
