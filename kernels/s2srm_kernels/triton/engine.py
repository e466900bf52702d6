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

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from s2srm_kernels.checks import compute_dtype, kept_dtype
from s2srm_kernels.lm_head.backward import no_gradients, set_entries_
from s2srm_kernels.lm_head.engine import (
    ALL,
    FLOOR,
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
from s2srm_kernels.triton import launch
from s2srm_kernels.triton.launch import Coefficients, Storage
from s2srm_kernels.triton.problem import Problem
from s2srm_kernels.triton.sample import draw

# Bound on a chunk of stored exponentials, and the sum of the weight's gradient where one chunk does
# not hold all rows, if the caller gives none: all of 8192 rows at V = 262144 in 16 bits.
WORKSPACE_BYTES = 4 * 2**30
# With fewer rows than these, unless there are no more, the weight is read too often.
MIN_CHUNK_ROWS = 2048
# What may be stored relative to the target's logit: as wide as the exponentials of float32, and too
# coarse to feel the digits that a distant reference costs.
ONE_PASS_DTYPES = {torch.bfloat16}
# Rows of a float32 sum that are made apart where a product cannot be added to it.
_ADDED_ROWS = 16384
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
        make = _in_one_pass if one_pass else _in_two_passes
        sums = _Sums(problem, needs, step)
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
                    launch.scale_(gradient, factor)


def row_coefficients(head: Head, statistics: RowStatistics, upstream: Upstream) -> Coefficients:
    """(6, R) max, log_sum, a, b, c and the target's entry of every row's dz (see backward).

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


class _LogitGradients(NamedTuple):
    """dz = row_scale[:, None] * matrix of a chunk: (r, V) and (r,), or None where it is 1."""

    matrix: Tensor
    row_scale: Tensor | None


def _in_one_pass(
    problem: Problem,
    rows: slice,
    targets: Tensor,
    upstream_of: UpstreamOf,
    wanted: Wanted,
    storage: Storage,
) -> tuple[RowStatistics, _LogitGradients]:
    """Exponentials relative to the target's logit; only the target's entry is touched again."""
    packed = launch.exponentials(problem, rows, targets, wanted.entropy, storage)
    part = merge(packed, problem.head)
    coefficients = row_coefficients(problem.head, part, upstream_of(part, rows))
    _, log_sum, linear, _, _, at_target = coefficients.values.unbind()
    # Of a row in which all but the target's entry vanish, they come out as this much of that entry.
    least = at_target * 2.0**-24
    linear = torch.where(linear.abs() < least.abs(), least, linear)
    scale = linear * (-log_sum).exp()
    entry = torch.where(scale == 0, 0.0, at_target / scale)
    launch.set_targets(problem, rows, entry, storage.exponentials)
    return part, _LogitGradients(storage.exponentials, scale)


def _in_two_passes(
    problem: Problem,
    rows: slice,
    targets: Tensor,
    upstream_of: UpstreamOf,
    wanted: Wanted,
    storage: Storage,
) -> tuple[RowStatistics, _LogitGradients]:
    """Exponentials relative to the largest logit so far, then dz in their place."""
    packed = launch.statistics(problem, rows, targets, wanted, storage=storage)
    part = merge(packed, problem.head)
    coefficients = row_coefficients(problem.head, part, upstream_of(part, rows))
    launch.stored_gradients(problem, rows, coefficients, storage)
    return part, _LogitGradients(storage.exponentials, None)


class _Sums:
    """Gradients made chunk by chunk of `step` rows, in the dtype that they are kept in."""

    def __init__(self, problem: Problem, needs: Sequence[bool], step: int) -> None:
        self.problem = problem
        self.dtype = kept_dtype(problem.hidden.dtype)
        self.hidden, self.weight, self.bias = no_gradients(problem.head, needs)
        self.hidden = self.hidden.to(self.dtype)
        if step >= problem.num_rows:
            # One product, which sums in the compute dtype, and one rounding.
            self.weight = self.weight.new_empty(self.weight.shape, dtype=self.dtype)

    def add(self, rows: slice, dz: _LogitGradients) -> None:
        """The products of one chunk."""
        problem, (matrix, scale) = self.problem, dz
        hidden, accumulate = problem.hidden[rows], rows.start > 0
        if self.hidden.numel():
            product = problem.empty(matrix.shape[0], hidden.shape[1])
            _product(matrix, problem.weight, product)
            if scale is not None:
                product *= scale[:, None]
            self.hidden.index_copy_(0, problem.head.rows[rows], product.to(self.dtype))
        if self.weight.numel():
            if scale is not None:
                hidden = (hidden * scale[:, None]).to(hidden.dtype)
            _product(matrix.t(), hidden, self.weight, accumulate)
        if self.bias.numel():
            if scale is None:
                self.bias += matrix.sum(dim=0, dtype=self.bias.dtype)
            else:
                part = self.bias.new_empty(self.bias.shape[0], 1)
                _product(matrix.t(), scale[:, None].to(matrix.dtype), part)
                self.bias += part.squeeze(1)

    def result(self) -> ThreeGradients:
        """In the dtype that they are kept in."""
        return self.hidden, self.weight.to(self.dtype), self.bias.to(self.dtype)


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
            launch.logit_gradients(problem, columns, coefficients, blocks, dz)
            if entries is not None:
                set_entries_(dz, entries, slice(None), columns.start)
            if needs[0]:
                _product(dz, problem.weight[columns], sums, accumulate=columns.start > 0)
            if needs[1]:
                _product(dz.t(), problem.hidden, d_weight[columns])
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


def _product(left: Tensor, right: Tensor, result: Tensor, accumulate: bool = False) -> None:
    """result = or += left @ right, summed in the compute dtype, rounded once to result's."""
    if left.dtype == result.dtype and (left.is_cuda or left.dtype.itemsize > 2):
        if accumulate:
            torch.addmm(result, left, right, out=result)
        else:
            torch.mm(left, right, out=result)
    elif left.is_cuda:
        # 16-bit factors, float32 result.
        if not accumulate:
            torch.mm(left, right, out_dtype=result.dtype, out=result)
        elif adds_mixed(left.device, left.dtype):
            torch.addmm(result, left, right, out_dtype=result.dtype, out=result)
        else:
            add_by_slabs(left, right, result)
    else:
        # The CPU, and so the interpreter, has neither 16-bit products of one rounding nor mixed.
        product = left.float() @ right.float()
        result.copy_(result + product if accumulate else product)


def add_by_slabs(left: Tensor, right: Tensor, result: Tensor) -> None:
    """result += left @ right with a product of _ADDED_ROWS rows at a time."""
    for start in range(0, result.shape[0], _ADDED_ROWS):
        some = slice(start, start + _ADDED_ROWS)
        if left.dtype == result.dtype:
            result[some] += torch.mm(left[some], right)
        else:
            result[some] += torch.mm(left[some], right, out_dtype=result.dtype)


@functools.cache
def adds_mixed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.addmm adds a product of 16-bit factors to a float32 sum in place.

    Tried, since neither torch's version nor the chip tells; without it a sum is made of products
    of _ADDED_ROWS rows, which costs one more pass over it.
    """
    left, total = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, left, left, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())
