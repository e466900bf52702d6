"""The reference engine: the definition of every vocabulary operation, in plain PyTorch.

Live rows are taken in chunks of at most max(TILE * V, 2**24) logits. A row has the same bits in any
batch (with the same number of threads), for which three things are fixed that decide a library's
order of summation: products are made from tiles of exactly TILE rows, the last one padded with
zeros, since a BLAS chooses by shape; rows of their factors and results begin on cache lines, since
MKL takes another path for a row off a 16-byte boundary on processors that are not Intel's; and
torch, which divides a sum to one value among threads, is never asked for one row's sum alone.

Left out: tiling over the vocabulary. The upcast weight is held whole for the length of the call.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from s2srm_kernels.checks import compute_dtype
from s2srm_kernels.dispatch import implement
from s2srm_kernels.lm_head.backward import no_gradients, scale_on_host_, set_entries_
from s2srm_kernels.lm_head.engine import (
    ALL,
    FLOOR,
    SKIP_COLUMNS,
    SKIP_ROWS,
    Draws,
    Entries,
    Packed,
    RowStatistics,
    ThreeGradients,
    Upstream,
    UpstreamOf,
    Wanted,
)
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.noise import Noise, gumbel
from s2srm_kernels.lm_head.statistics import merge

TILE = 128
_CHUNK_ELEMENTS = 2**24
_LINE_BYTES = 64


def register() -> dict[str, str | None]:
    """Register the engine for every device; nothing can stand in its way."""
    implement("reference", "CompositeExplicitAutograd", ReferenceEngine())
    return {}


class ReferenceEngine:
    """`Engine` in plain PyTorch, on every device, in float32 or float64."""

    def target_logits(self, head: Head, columns: Tensor | None = None) -> Tensor:
        problem = _Problem(head)
        wanted = head.columns[:, None] if columns is None else columns
        parts = [at_columns(problem.logits(rows), wanted[rows]) for rows in problem.chunks()]
        logits = torch.cat([head.weight.new_empty((0, wanted.shape[1]), dtype=head.dtype), *parts])
        return logits.squeeze(1) if columns is None else logits

    def statistics(
        self,
        head: Head,
        target_logits: Tensor | None,
        tiles: bool,
        wanted: Wanted = ALL,
    ) -> tuple[Tensor, Tensor | None]:
        problem = _Problem(head)
        packed: list[Tensor] = []
        tile_lse: list[Tensor] = []
        for rows in problem.chunks():
            z = problem.logits(rows)
            packed.append(problem.pack(z, rows, target_logits))
            if tiles:
                tile_lse.append(_tile_lse(z[: rows.stop - rows.start]))
        if not packed:
            empty = head.weight.new_empty((0, Packed.width), dtype=head.dtype)
            return empty, empty.new_empty(0, num_tiles(head)) if tiles else None
        return torch.cat(packed), torch.cat(tile_lse) if tiles else None

    def sample(self, head: Head, noise: Noise | None, suppressed: Tensor | None) -> Draws:
        problem = _Problem(head)
        none = head.weight.new_empty(0, dtype=head.dtype)
        parts = [(none, head.rows[:0], none.view(0, Packed.width))]
        for rows in problem.chunks():
            z = problem.logits(rows)
            packed = problem.pack(z, rows, None)
            perturbed = z = z[: len(packed)]
            if noise is not None:
                cut = Noise(noise.seeds[rows], noise.positions[rows])
                perturbed = z + gumbel(cut, head.shard.offset, z.shape[1])
            if suppressed is not None:
                perturbed = perturbed.masked_fill(suppressed, -torch.inf)
            columns = perturbed.argmax(dim=1)  # of equal maxima, the first
            packed[:, Packed.target_logit] = z.gather(1, columns[:, None]).squeeze(1)
            best = perturbed.gather(1, columns[:, None]).squeeze(1)
            parts.append((best, columns, packed))
        return Draws(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def gradients_in_forward(
        self, hidden: Tensor, weight: Tensor, workspace_bytes: int | None
    ) -> bool:
        dtype = compute_dtype(hidden)
        tile_bytes = TILE * _row_stride(weight.shape[0], dtype) * dtype.itemsize
        return workspace_bytes is None or tile_bytes <= workspace_bytes

    def statistics_with_gradients(
        self,
        head: Head,
        upstream_of: UpstreamOf,
        needs: Sequence[bool],
        workspace_bytes: int | None,
        wanted: Wanted = ALL,
        proportional: bool = False,
    ) -> tuple[RowStatistics, ThreeGradients]:
        problem = _Problem(head, workspace_bytes)
        sums = _Sums(problem, needs)
        parts: list[RowStatistics] = []
        for rows in problem.chunks():
            z = problem.logits(rows)
            part = merge(problem.pack(z, rows, None), head)
            dz = problem.logit_gradients_(z, rows, part, upstream_of(part, rows))
            sums.add(rows, dz)
            parts.append(part)
        merged = RowStatistics(*(torch.cat(field) for field in zip(*parts, strict=True)))
        return merged, sums.result()

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
        sums = _Sums(problem, needs)
        for rows in problem.chunks():
            part = RowStatistics(*(field[rows] for field in statistics))
            cut = upstream.map(operator.itemgetter(rows))
            dz = problem.logit_gradients_(problem.logits(rows), rows, part, cut)
            if entries is not None:
                set_entries_(dz, entries, rows, 0)
            if live is not None:
                dz.masked_fill_(~_expand_blocks(live, rows, dz.shape), 0)
            sums.add(rows, dz)
        d_hidden, d_weight, d_bias = sums.result()
        if head.shard.group is None:
            d_hidden = d_hidden.to(head.hidden.dtype)
        return d_hidden, d_weight.to(head.hidden.dtype), d_bias.to(head.hidden.dtype)

    def scale_(self, gradients: Sequence[Tensor], factor: Tensor) -> None:
        scale_on_host_(gradients, factor)


def num_tiles(head: Head) -> int:
    """T."""
    return -(-head.weight.shape[0] // SKIP_COLUMNS)


def pad_rows(values: Tensor, fill: float = 0) -> Tensor:
    """Rows of `fill` appended up to a multiple of TILE."""
    missing = -values.shape[0] % TILE
    if missing == 0:
        return values
    return torch.cat([values, values.new_full((missing, *values.shape[1:]), fill)])


def at_columns(z: Tensor, columns: Tensor) -> Tensor:
    """(P, V) logits at (r, K) columns -> (r, K), -inf where a column is -1."""
    picked = z[: len(columns)].gather(1, columns.clamp(min=0))
    return picked.masked_fill(columns < 0, -torch.inf)


def empty_rows(num_rows: int, num_columns: int, like: Tensor) -> Tensor:
    """Unset, every row on a cache line of its own."""
    return like.new_empty(num_rows, _row_stride(num_columns, like.dtype))[:, :num_columns]


def align_rows(matrix: Tensor) -> Tensor:
    """The matrix if its rows begin on cache lines, else a copy whose rows do."""
    stride, itemsize = matrix.stride(), matrix.dtype.itemsize
    in_lines = (stride[0] * itemsize) % _LINE_BYTES == 0 and matrix.data_ptr() % _LINE_BYTES == 0
    if in_lines and stride[1] == 1 and stride[0] >= matrix.shape[1]:
        return matrix
    return empty_rows(matrix.shape[0], matrix.shape[1], matrix).copy_(matrix)


def matmul_tiles(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, TILE rows at a time; both with aligned rows, or right transposed."""
    product = empty_rows(left.shape[0], right.shape[1], left)
    for start in range(0, left.shape[0], TILE):
        tile = slice(start, start + TILE)
        torch.mm(left[tile], right, out=product[tile])
    return product


class _Problem:
    """A head upcast to the compute dtype, its live rows in padded chunks of P rows."""

    def __init__(self, head: Head, workspace_bytes: int | None = None) -> None:
        self.head = head
        self.weight = align_rows(head.weight.to(head.dtype))
        self.bias = None if head.bias is None else head.bias.to(head.dtype)
        elements = _CHUNK_ELEMENTS
        if workspace_bytes is not None:
            elements = workspace_bytes // head.dtype.itemsize
        stride = _row_stride(head.weight.shape[0], head.dtype)
        self.step = max(1, elements // stride // TILE) * TILE

    def chunks(self) -> Iterator[slice]:
        """Consecutive slices of the live rows."""
        for start in range(0, self.head.num_live, self.step):
            yield slice(start, min(start + self.step, self.head.num_live))

    def hidden(self, rows: slice) -> Tensor:
        """(P, D) rows of hidden, padded with zero rows to a multiple of TILE."""
        hidden = pad_rows(self.head.hidden[self.head.rows[rows]].to(self.head.dtype))
        return align_rows(hidden)

    def logits(self, rows: slice) -> Tensor:
        """(P, V) logits in a fresh buffer."""
        head = self.head
        z = matmul_tiles(self.hidden(rows), self.weight.t())
        if self.bias is not None:
            z += self.bias
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        if head.temperature != 1.0:
            z /= head.temperature
        return z

    def pack(self, z: Tensor, rows: slice, target_logits: Tensor | None) -> Tensor:
        """(P, V) logits -> (r, Packed.width) statistics of the chunk's r rows on this rank."""
        target_logit = at_columns(z, self.head.columns[rows, None]).squeeze(1)
        num_rows = len(target_logit)
        above = torch.zeros_like(target_logit)
        if target_logits is not None:
            above = (z[:num_rows] > target_logits[rows, None]).sum(dim=1)
        z = z[: max(num_rows, 2)]  # a sum of one row alone would be divided among threads
        argmax = z.argmax(dim=1)  # of equal maxima, the first
        # A shard whose logits are all -inf must not subtract -inf from -inf.
        max_logit = z.gather(1, argmax[:, None]).clamp_(min=torch.finfo(z.dtype).min)
        shifted = z - max_logit
        sum_shift = shifted.sum(dim=1)
        exponential = shifted.clamp_(min=FLOOR).exp().scatter_(1, argmax[:, None], 0)
        rest = exponential.sum(dim=1)
        sum_exp_shift = exponential.mul_(shifted).sum(dim=1)
        # Ids are exact in float32 up to 2**24 columns on a rank.
        columns = (max_logit.squeeze(1), rest, sum_exp_shift, sum_shift)
        packed = [*columns, target_logit, argmax, above]
        return torch.stack([field[:num_rows].to(z.dtype) for field in packed], dim=1)

    def logit_gradients_(
        self, z: Tensor, rows: slice, statistics: RowStatistics, upstream: Upstream
    ) -> Tensor:
        """(P, V) logits -> the gradients with respect to hidden @ weight.T + bias. Overwrites z.

        statistics and upstream are those of the chunk's r rows; padding rows get zeros.
        """
        head, temperature = self.head, self.head.temperature

        up = upstream.map(lambda values: pad_rows(values)[:, None])
        slope = None
        if head.softcap is not None:
            slope = 1 - (z * (temperature / head.softcap)).square_()
        # lse itself is not subtracted: max and log_sum apart keep their digits under a large
        # offset. Padding rows get a maximum of inf, hence p = 0 whatever the bias is.
        logp = z.sub_(pad_rows(statistics.max_logit, torch.inf)[:, None])
        logp = logp.sub_(pad_rows(statistics.log_sum)[:, None])
        column = pad_rows(head.columns[rows], -1)[:, None]
        owned, column = column >= 0, column.clamp(min=0)
        target_logp = logp.gather(1, column)
        coefficient = torch.zeros_like(up.logprobs)
        if up.lse is not None:
            coefficient = coefficient + up.lse
        if up.mean_logprob is not None:
            coefficient = coefficient - up.mean_logprob
        target_p = target_logp.exp()
        p = torch.exp(logp, out=empty_rows(logp.shape[0], logp.shape[1], logp))
        if up.entropy is None:
            dz = p.mul_(coefficient - up.logprobs)
        else:
            row_entropy = pad_rows(statistics.entropy)[:, None]
            factor = logp.clamp_(min=FLOOR).add_(row_entropy).mul_(-up.entropy)
            dz = p.mul_(factor.add_(coefficient - up.logprobs))
            target_factor = target_logp.clamp(min=FLOOR) + row_entropy
            coefficient = coefficient - up.entropy * target_factor
        at_target = coefficient * target_p - up.logprobs * torch.expm1(target_logp)
        dz.scatter_(1, column, at_target.where(owned, dz.gather(1, column)))
        if up.mean_logprob is not None:
            dz += up.mean_logprob / head.shard.num_total
        if slope is not None:
            dz *= slope
        if temperature != 1.0:
            dz /= temperature
        return dz


class _Sums:
    """Sums of the gradients over chunks, in the compute dtype; empty where not needed."""

    def __init__(self, problem: _Problem, needs: Sequence[bool]) -> None:
        self.problem = problem
        self.needs = needs
        self.hidden, self.weight, self.bias = no_gradients(problem.head, needs)

    def add(self, rows: slice, dz: Tensor) -> None:
        """Add the products of one chunk's (P, V) logit gradients."""
        head = self.problem.head
        if self.needs[0]:
            d_hidden = matmul_tiles(dz, self.problem.weight)[: rows.stop - rows.start]
            self.hidden.index_copy_(0, head.rows[rows], d_hidden)
        if self.weight.numel():
            self.weight.addmm_(dz.t(), self.problem.hidden(rows))
        if self.bias.numel():
            self.bias += dz.sum(dim=0)

    def result(self) -> ThreeGradients:
        return self.hidden, self.weight, self.bias


def _row_stride(num_columns: int, dtype: torch.dtype) -> int:
    """Elements from row to row of a matrix whose rows begin on cache lines."""
    line = _LINE_BYTES // dtype.itemsize
    return -(-num_columns // line) * line


def _tile_lse(z: Tensor) -> Tensor:
    """(r, V) logits -> (r, T)."""
    tiles: tuple[Tensor, ...] = z.split(SKIP_COLUMNS, dim=1)
    return torch.stack([tile.logsumexp(dim=1) for tile in tiles], dim=1)


def _expand_blocks(live: Tensor, rows: slice, shape: torch.Size) -> Tensor:
    """(row blocks, T) -> (P, V) for a chunk of rows; padding rows are whatever comes last."""
    row = torch.arange(rows.start, rows.start + shape[0], device=live.device) // SKIP_ROWS
    column = torch.arange(shape[1], device=live.device) // SKIP_COLUMNS
    return live[row.clamp(max=live.shape[0] - 1)][:, column]
