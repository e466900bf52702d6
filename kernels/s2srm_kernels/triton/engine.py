"""The Triton engine of the vocabulary operations: statistics, and gradients in two orders.

Rows first (`statistics_with_gradients`): a chunk of rows, all columns, three products. The
statistics store e^(z - reference) in the inputs' dtype, and that becomes the gradients of the
logits, in one of two ways:

* In one pass. Where a row's upstream gradients are of log p(target) and lse alone, its dz is
  proportional to p but for the target's entry. The target's logit is known before the product, so
  E = e^(z - z_target) can be stored with one reference a row. With u = (c - a) e^(z_target - lse)
  of the row (a, c: see lm_head.backward) all the rest happens in the factors of the products:

      d_hidden = u * (E @ weight)      d_weight = E^T @ (u * hidden)      d_bias = E^T @ u

  Only the target's entry of E is set, to dz_target / u: a confident row, whose 1 - p is tiny, keeps
  its digits. For bfloat16, which has the range of float32; the softcap's slope is in E.
* In two. With an entropy or label smoothing term, and in other dtypes, a second kernel turns the
  exponentials, relative to the row's largest logit up to there, into dz in place.

Columns first (`gradients`): a chunk of columns, all rows, the logits made again: four products with
the forward's, each row of the weight's gradient finished at once and rounded once. Blocks that
`skip_mass` leaves out are zeros that no product was made for; the two products with them are dense.

Dense products are torch's (cuBLAS). Left out: products that skip blocks of zeros (element-wise
loads at an uneven stride cost more than a dense product saves), and a search for the best chunk.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from s2srm_kernels.checks import compute_dtype, kept_dtype
from s2srm_kernels.lm_head.backward import set_entries_
from s2srm_kernels.lm_head.engine import (
    ALL,
    SKIP_COLUMNS,
    SKIP_ROWS,
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
from s2srm_kernels.triton import launch, launch_backward
from s2srm_kernels.triton.launch import Storage
from s2srm_kernels.triton.problem import Problem
from s2srm_kernels.triton.products import product_into
from s2srm_kernels.triton.sample import draw
from s2srm_kernels.triton.stored_order import Sums, in_one_pass, in_two_passes, row_coefficients

# Bound on a chunk of stored exponentials, and the sum of the weight's gradient where one chunk does
# not hold all rows, if the caller gives none: all of 8192 rows at V = 262144 in 16 bits.
WORKSPACE_BYTES = 4 * 2**30
# With fewer rows than these, unless there are no more, the weight is read too often.
MIN_CHUNK_ROWS = 2048
# What may be stored relative to the target's logit: as wide as the exponentials of float32, and too
# coarse to feel the digits that a distant reference costs.
ONE_PASS_DTYPES = {torch.bfloat16}
# Bound on a chunk of logit gradients where the logits are made again.
GRADIENT_CHUNK_BYTES = 256 * 2**20
MIN_CHUNK_COLUMNS = 2048


class TritonEngine:
    """`Engine` on a GPU of compute capability 8.0 or later, and in Triton's interpreter."""

    def target_logits(self, head: Head, columns: Tensor | None = None) -> Tensor:
        problem = Problem(head)
        if problem.num_rows == 0:
            return problem.empty(*head.columns.shape if columns is None else columns.shape)
        with problem.on_device():
            if columns is None:
                return launch.target_logits(problem)
            narrow = columns.to(torch.int32)
            logits = [launch.target_logits(problem, ids.contiguous()) for ids in narrow.unbind(1)]
            return torch.stack(logits, dim=1)

    def statistics(
        self,
        head: Head,
        target_logits: Tensor | None,
        tiles: bool,
        wanted: Wanted = ALL,
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
            packed = launch.statistics(
                problem, slice(0, num_rows), targets, wanted, count, tile_lse
            )
        if tile_lse is None:
            return packed, None
        return packed, tile_lse.view(num_tiles, -1, num_rows).logsumexp(dim=1).t()

    def sample(self, head: Head, noise: Noise | None, suppressed: Tensor | None) -> Draws:
        problem = Problem(head)
        if problem.num_rows == 0:
            return Draws(problem.empty(0), head.rows, None)
        with problem.on_device():
            return Draws(*draw(problem, noise, suppressed), None)

    def gradients_in_forward(
        self, hidden: Tensor, weight: Tensor, workspace_bytes: int | None
    ) -> bool:
        return _chunk_rows(hidden, weight, workspace_bytes, hidden.shape[0]) > 0

    def statistics_with_gradients(
        self,
        head: Head,
        upstream_of: UpstreamOf,
        needs: Sequence[bool],
        workspace_bytes: int | None,
        wanted: Wanted = ALL,
        proportional: bool = False,
    ) -> tuple[RowStatistics, ThreeGradients]:
        problem = Problem(head)
        step = _chunk_rows(problem.hidden, head.weight, workspace_bytes, problem.num_rows)
        one_pass = (
            proportional
            and not (wanted.maximum or wanted.mean)
            and head.hidden.dtype in ONE_PASS_DTYPES
        )
        if step == 0 or not (one_pass or _keeps_logits(head)):
            return _statistics_then_gradients(problem, upstream_of, needs, wanted)
        make = in_one_pass if one_pass else in_two_passes
        sums = Sums(problem, needs, step)
        parts: list[RowStatistics] = []
        with problem.on_device():
            targets = launch.target_logits(problem)
            buffers = Storage.allocate(problem, min(step, problem.num_rows), one_pass, wanted)
            for start in range(0, problem.num_rows, step):
                rows = slice(start, min(start + step, problem.num_rows))
                storage = buffers.rows(rows.stop - rows.start)
                part, dz = make(problem, rows, targets[rows], upstream_of, wanted, storage)
                sums.add(rows, dz)
                parts.append(part)
        statistics = RowStatistics(*(torch.cat(field) for field in zip(*parts, strict=True)))
        return statistics, sums.result()

    def gradients(
        self,
        head: Head,
        statistics: RowStatistics,
        upstream: Upstream,
        needs: Sequence[bool],
        live: Tensor | None,
        entries: Entries | None = None,
    ) -> ThreeGradients:
        problem = Problem(head)
        dtype = head.hidden.dtype
        return _recompute(problem, statistics, upstream, needs, live, dtype, entries)

    def scale_(self, gradients: Sequence[Tensor], factor: Tensor) -> None:
        for gradient in gradients:
            if gradient.numel():
                with torch.cuda.device(gradient.device) if gradient.is_cuda else nullcontext():
                    launch_backward.scale_(gradient, factor)


def _chunk_rows(hidden: Tensor, weight: Tensor, workspace_bytes: int | None, num_rows: int) -> int:
    """Rows of a chunk of num_rows whose exponentials are stored; 0 where too few fit.

    All where they fit, and the weight's gradient then needs no sum. Otherwise chunks of one size,
    whole blocks of rows, but for what the last one lacks. A row's bits do not depend on where its
    chunk begins.
    """
    dtype = compute_dtype(hidden)
    bound = WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    row_bytes = launch.storage_stride(weight.shape[0]) * hidden.dtype.itemsize
    if num_rows * row_bytes <= bound:
        return max(num_rows, 1)
    most = int((bound - weight.numel() * dtype.itemsize) // row_bytes) // SKIP_ROWS * SKIP_ROWS
    if most < min(MIN_CHUNK_ROWS, num_rows):
        return 0
    num_chunks = -(-num_rows // most)
    return -(-num_rows // (num_chunks * SKIP_ROWS)) * SKIP_ROWS


def _keeps_logits(head: Head) -> bool:
    """Whether a stored exponential is never 0, where the softcap's slope asks for its logit."""
    if head.softcap is None:
        return True
    lowest = 20 if head.hidden.dtype == torch.float16 else 80
    return 2 * head.softcap / head.temperature <= lowest


def _statistics_then_gradients(
    problem: Problem, upstream_of: UpstreamOf, needs: Sequence[bool], wanted: Wanted
) -> tuple[RowStatistics, ThreeGradients]:
    """The columns-first order for a loss whose upstream gradients are known after the forward."""
    everything = slice(0, problem.num_rows)
    with problem.on_device():
        targets = launch.target_logits(problem)
        packed = launch.statistics(problem, everything, targets, wanted)
    statistics = merge(packed, problem.head)
    upstream = upstream_of(statistics, everything)
    dtype = kept_dtype(problem.hidden.dtype)
    return statistics, _recompute(problem, statistics, upstream, needs, None, dtype)


def _recompute(
    problem: Problem,
    statistics: RowStatistics,
    upstream: Upstream,
    needs: Sequence[bool],
    live: Tensor | None,
    dtype: torch.dtype,
    entries: Entries | None = None,
) -> ThreeGradients:
    """Gradients with the logits made again, in `dtype`; with a group d_hidden in the compute dtype.

    live (>= ceil(R / SKIP_ROWS), T): the blocks that are computed; the others are zeros.
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
            launch_backward.logit_gradients(problem, columns, coefficients, blocks, dz)
            if entries is not None:
                set_entries_(dz, entries, slice(None), columns.start)
            if needs[0]:
                product_into(dz, problem.weight[columns], sums, accumulate=columns.start > 0)
            if needs[1]:
                product_into(dz.t(), problem.hidden, d_weight[columns])
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
