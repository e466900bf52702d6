"""The Triton engine of the vocabulary operations: statistics, and gradients in two orders.

Rows first (`statistics_with_gradients`): a chunk of rows, all columns; the statistics store their
exponentials, which become the gradients of the logits in place: three products, and a sum of the
weight's gradient in the compute dtype. Columns first (`gradients`): a chunk of columns, all rows,
the logits made again: four products with the forward's, each row of the weight's gradient finished
at once and rounded once. Dense products are torch's (cuBLAS).

Left out: a search for the best chunk; both orders take the largest that their bound allows.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from s2srm_kernels.checks import compute_dtype
from s2srm_kernels.lm_head.backward import no_gradients
from s2srm_kernels.lm_head.engine import (
    FLOOR,
    SKIP_COLUMNS,
    SKIP_ROWS,
    RowStatistics,
    ThreeGradients,
    Upstream,
    UpstreamOf,
)
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.statistics import merge
from s2srm_kernels.triton import launch
from s2srm_kernels.triton.launch import Coefficients, Storage
from s2srm_kernels.triton.problem import Problem

# Bound on a chunk of stored exponentials and the sum of the weight's gradient where the caller
# gives none: in 16 bits 2048 rows at V = 256000, D = 3072, every row at V = 32000.
WORKSPACE_BYTES = 4 * 2**30
# With fewer rows than these, unless there are no more, the weight is read too often.
MIN_CHUNK_ROWS = 2048
# The fewest columns that share a reference, by compute dtype: what a row's references cost.
_REFERENCE_COLUMNS = {torch.float32: 32, torch.float64: 16}
# Bound on a chunk of logit gradients where the logits are made again.
GRADIENT_CHUNK_BYTES = 256 * 2**20
MIN_CHUNK_COLUMNS = 2048


class TritonEngine:
    """`Engine` on a GPU of compute capability 8.0 or later, and in Triton's interpreter."""

    def target_logits(self, head: Head) -> Tensor:
        problem = Problem(head)
        if problem.num_rows == 0:
            return problem.empty(0)
        with problem.on_device():
            return launch.target_logits(problem)

    def statistics(
        self, head: Head, target_logits: Tensor | None, tiles: bool
    ) -> tuple[Tensor, Tensor | None]:
        problem = Problem(head)
        num_rows = problem.num_rows
        num_tiles = -(-problem.num_columns // SKIP_COLUMNS)
        if num_rows == 0:
            return problem.empty(0, 7), problem.empty(0, num_tiles) if tiles else None
        tile_lse = None
        if tiles:
            per_tile = SKIP_COLUMNS // problem.tile("statistics").block_n
            tile_lse = problem.empty(num_tiles * per_tile, num_rows).fill_(-math.inf)
        count = target_logits is not None
        with problem.on_device():
            targets = launch.target_logits(problem) if target_logits is None else target_logits
            packed = launch.statistics(problem, slice(0, num_rows), targets, count, tile_lse)
        if tile_lse is None:
            return packed, None
        return packed, tile_lse.view(num_tiles, -1, num_rows).logsumexp(dim=1).t()

    def gradients_in_forward(
        self, hidden: Tensor, weight: Tensor, workspace_bytes: int | None
    ) -> bool:
        return _chunk_rows(hidden, weight, workspace_bytes) > 0

    def statistics_with_gradients(
        self,
        head: Head,
        upstream_of: UpstreamOf,
        needs: Sequence[bool],
        workspace_bytes: int | None,
    ) -> tuple[RowStatistics, ThreeGradients]:
        problem = Problem(head)
        step = _chunk_rows(head.hidden, head.weight, workspace_bytes)
        if step == 0 or not _keeps_logits(head):
            return _statistics_then_gradients(problem, upstream_of, needs)
        sums = no_gradients(head, needs)
        parts: list[RowStatistics] = []
        with problem.on_device():
            targets = launch.target_logits(problem)
            buffers = Storage.allocate(problem, min(step, problem.num_rows))
            for start in range(0, problem.num_rows, step):
                rows = slice(start, min(start + step, problem.num_rows))
                storage = buffers.rows(rows.stop - rows.start)
                packed = launch.statistics(
                    problem, rows, targets[rows], count=False, storage=storage
                )
                part = merge(packed, head)
                upstream = upstream_of(part, rows)
                coefficients = row_coefficients(head, part, upstream)
                launch.stored_gradients(problem, rows, coefficients, storage)
                _add_products(problem, rows, storage.exponentials, sums)
                parts.append(part)
        return RowStatistics(*(torch.cat(field) for field in zip(*parts, strict=True))), sums

    def gradients(
        self,
        head: Head,
        statistics: RowStatistics,
        upstream: Upstream,
        needs: Sequence[bool],
        live: Tensor | None,
    ) -> ThreeGradients:
        problem = Problem(head)
        return _recompute(problem, statistics, upstream, needs, live, head.hidden.dtype)


def row_coefficients(head: Head, statistics: RowStatistics, upstream: Upstream) -> Coefficients:
    """(6, R) max, log_sum, a, b, c and the target's entry of every row's dz (triton._gradients).

    A target on another rank has an entry too, which no column asks for.
    """
    target_logp = statistics.logprobs
    others = torch.zeros_like(upstream.logprobs)
    constant, slope = others, others
    if upstream.lse is not None:
        others = others + upstream.lse
    if upstream.mean_logprob is not None:
        others = others - upstream.mean_logprob
        constant = upstream.mean_logprob / head.shard.num_total
    linear = others - upstream.logprobs
    if upstream.entropy is not None:
        slope, entropy = upstream.entropy, statistics.entropy
        linear = linear - slope * entropy
        others = others - slope * (target_logp.clamp(min=FLOOR) + entropy)
    at_target = others * target_logp.exp() - upstream.logprobs * target_logp.expm1() + constant
    if head.softcap is not None:
        capped = statistics.target_logit * (head.temperature / head.softcap)
        at_target = at_target * (1 - capped.square())
    dz = torch.stack([linear, slope, constant, at_target]) / head.temperature
    values = torch.cat([torch.stack([statistics.max_logit, statistics.log_sum]), dz])
    return Coefficients(values, upstream.entropy is not None, upstream.mean_logprob is not None)


def _chunk_rows(hidden: Tensor, weight: Tensor, workspace_bytes: int | None) -> int:
    """Rows of a chunk whose exponentials are stored; 0 where too few fit the workspace.

    Not a multiple of any tile: a row's bits do not depend on where its chunk begins.
    """
    num_columns, dtype = weight.shape[0], compute_dtype(hidden)
    bound = WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    column_bytes = hidden.dtype.itemsize + dtype.itemsize / _REFERENCE_COLUMNS[dtype]
    row_bytes = launch.storage_stride(num_columns) * column_bytes
    rows = int((bound - weight.numel() * dtype.itemsize) // row_bytes)
    if rows < min(MIN_CHUNK_ROWS, hidden.shape[0]):
        return 0
    return rows if rows < MIN_CHUNK_ROWS else rows // SKIP_ROWS * SKIP_ROWS


def _keeps_logits(head: Head) -> bool:
    """Whether a stored exponential is never 0, where the softcap's slope asks for its logit."""
    if head.softcap is None:
        return True
    lowest = 20 if head.hidden.dtype == torch.float16 else 80
    return 2 * head.softcap / head.temperature <= lowest


def _statistics_then_gradients(
    problem: Problem, upstream_of: UpstreamOf, needs: Sequence[bool]
) -> tuple[RowStatistics, ThreeGradients]:
    """The columns-first order for a loss whose upstream gradients are known after the forward."""
    everything = slice(0, problem.num_rows)
    with problem.on_device():
        targets = launch.target_logits(problem)
        packed = launch.statistics(problem, everything, targets, count=False)
    statistics = merge(packed, problem.head)
    upstream = upstream_of(statistics, everything)
    dtype = problem.head.dtype
    return statistics, _recompute(problem, statistics, upstream, needs, None, dtype)


def _add_products(problem: Problem, rows: slice, dz: Tensor, sums: ThreeGradients) -> None:
    """Add the products of one chunk's (r, V) logit gradients to the sums that are needed."""
    d_hidden, d_weight, d_bias = sums
    if d_hidden.numel():
        product = problem.empty(dz.shape[0], d_hidden.shape[1])
        _product(dz, problem.weight, product)
        d_hidden.index_copy_(0, problem.head.rows[rows], product)
    if d_weight.numel():
        _product(dz.t(), problem.hidden[rows], d_weight, accumulate=rows.start > 0)
    if d_bias.numel():
        d_bias += dz.sum(dim=0, dtype=d_bias.dtype)


def _recompute(
    problem: Problem,
    statistics: RowStatistics,
    upstream: Upstream,
    needs: Sequence[bool],
    live: Tensor | None,
    dtype: torch.dtype,
) -> ThreeGradients:
    """Gradients with the logits made again, in `dtype`; with a group d_hidden in the compute dtype.

    live (>= ceil(R / SKIP_ROWS), T): the blocks that are computed.
    """
    head = problem.head
    coefficients = row_coefficients(head, statistics, upstream)
    sums = problem.empty(problem.num_rows if needs[0] else 0, head.hidden.shape[1])
    d_weight = head.weight.new_empty(head.weight.shape if needs[1] else (0,), dtype=dtype)
    needs_bias = needs[2] and head.bias is not None
    d_bias = head.weight.new_empty(head.weight.shape[0] if needs_bias else 0, dtype=dtype)
    chunks = list(_column_chunks(problem))
    width = chunks[0].stop - chunks[0].start
    buffer = problem.hidden.new_empty(problem.num_rows, launch.storage_stride(width))
    with problem.on_device():
        for columns in chunks:
            dz = buffer[:, : columns.stop - columns.start]
            blocks = None
            if live is not None:
                tiles = slice(columns.start // SKIP_COLUMNS, -(-columns.stop // SKIP_COLUMNS))
                blocks = live[: -(-problem.num_rows // SKIP_ROWS), tiles].contiguous()
                if needs_bias:
                    dz.zero_()
            launch.logit_gradients(problem, columns, coefficients, blocks, dz)
            if needs[0]:
                first = columns.start == 0
                _live_or_dense(problem, dz, problem.weight[columns], blocks, sums, not first)
            if needs[1]:
                rows = None if blocks is None else blocks.t()
                part = d_weight[columns]
                _live_or_dense(problem, dz.t(), problem.hidden, rows, part, False)
            if needs_bias:
                d_bias[columns] = dz.sum(dim=0, dtype=head.dtype)
    if not needs[0]:
        return head.hidden.new_empty(0, dtype=dtype), d_weight, d_bias
    if head.shard.group is None:
        sums = sums.to(dtype)
    return head.scatter(sums), d_weight, d_bias


def _column_chunks(problem: Problem) -> Iterator[slice]:
    """Slices of the columns, all but the last a multiple of SKIP_COLUMNS long."""
    column_bytes = max(problem.num_rows, 1) * problem.hidden.dtype.itemsize
    step = max(MIN_CHUNK_COLUMNS, GRADIENT_CHUNK_BYTES // column_bytes)
    step = -(-step // SKIP_COLUMNS) * SKIP_COLUMNS
    for start in range(0, problem.num_columns, step):
        yield slice(start, min(start + step, problem.num_columns))


def _live_or_dense(
    problem: Problem,
    left: Tensor,
    right: Tensor,
    blocks: Tensor | None,
    result: Tensor,
    accumulate: bool,
) -> None:
    """result = or += left @ right; with `blocks` over the live blocks of left alone."""
    if blocks is None:
        _product(left, right, result, accumulate)
        return
    skip = (SKIP_ROWS, SKIP_COLUMNS)
    if left.stride(0) == 1:
        skip = (SKIP_COLUMNS, SKIP_ROWS)
    launch.live_product(problem, left, right, blocks, result, skip, accumulate)


def _product(left: Tensor, right: Tensor, result: Tensor, accumulate: bool = False) -> None:
    """result = or += left @ right, summed in the compute dtype, rounded once to result's."""
    if left.dtype == result.dtype and (left.is_cuda or left.dtype.itemsize > 2):
        if accumulate:
            torch.addmm(result, left, right, out=result)
        else:
            torch.mm(left, right, out=result)
    elif left.is_cuda:
        # 16-bit factors, float32 result.
        if accumulate:
            torch.addmm(result, left, right, out_dtype=result.dtype, out=result)
        else:
            torch.mm(left, right, out_dtype=result.dtype, out=result)
    else:
        # The CPU, and so the interpreter, has neither 16-bit products of one rounding nor mixed.
        product = left.float() @ right.float()
        result.copy_(result + product if accumulate else product)
