"""One function for each kernel: grid, tile and arguments.

Slices of rows and columns are those of a `Problem`; every buffer belongs to the caller.
"""

# torch and triton annotate their functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from s2srm_kernels.lm_head.engine import SKIP_COLUMNS, SKIP_ROWS
from s2srm_kernels.triton import configs
from s2srm_kernels.triton.backward import logit_gradients_kernel, stored_gradients_kernel
from s2srm_kernels.triton.forward import (
    merge_kernel,
    statistics_kernel,
    target_logits_kernel,
)
from s2srm_kernels.triton.live_product import live_product_kernel
from s2srm_kernels.triton.problem import OPTIONS, Problem

# Pieces of the tile of targets: a bit is the same in any number of them.
TARGET_PARTS = 4
MERGE_ROWS = 32
MERGE_WARPS = 1
STORED_ROWS = 16
STORED_WARPS = 4
PARTIAL_FIELDS = 6
PACKED_FIELDS = 7


class Storage(NamedTuple):
    """What the statistics store for the gradients of the same rows.

    exponentials (r, V): e^(z - reference) * scale in the inputs' dtype. references (parts, r): of
    each part of a tile, `width` columns. headroom: how far a logit may lie above the reference.
    """

    exponentials: Tensor
    references: Tensor
    width: int
    headroom: float
    scale: float

    @classmethod
    def allocate(cls, problem: Problem, num_rows: int) -> Storage:
        """Uninitialised buffers; the rows of `exponentials` begin at multiples of 256 entries."""
        width = part_width(problem)
        exponentials = problem.hidden.new_empty(num_rows, storage_stride(problem.num_columns))[
            :, : problem.num_columns
        ]
        references = problem.empty(-(-problem.num_columns // width), num_rows)
        # float16 ends at 65504: everything relative to the part's own maximum, and small
        # exponentials moved up from the subnormals. The others have room above the target's logit.
        half = problem.hidden.dtype == torch.float16
        headroom, scale = (-math.inf, 2.0**15) if half else (60.0, 1.0)
        return cls(exponentials, references, width, headroom, scale)

    def rows(self, count: int) -> Storage:
        """The same for the first `count` rows alone."""
        flat = self.references.flatten()[: self.references.shape[0] * count]
        references = flat.view(self.references.shape[0], count)
        return self._replace(exponentials=self.exponentials[:count], references=references)


def part_width(problem: Problem) -> int:
    """Columns that share a reference."""
    tile = problem.tile("stored_statistics")
    return tile.block_n // tile.parts


def storage_stride(num_columns: int) -> int:
    """Entries from row to row of a matrix of logit gradients: products like aligned rows."""
    return -(-num_columns // SKIP_COLUMNS) * SKIP_COLUMNS


def target_logits(problem: Problem) -> Tensor:
    """(R,) logits at the targets, -inf where another rank owns the target."""
    logits = problem.empty(problem.num_rows)
    tile = problem.tile("statistics")
    operands = problem.operands(tile, slice(None), slice(None), pointers=True)
    grid = (-(-problem.num_rows // tile.block_m), -(-tile.block_m // tile.block_n))
    _start(
        target_logits_kernel,
        grid,
        columns=problem.columns,
        logits=logits,
        PARTS=TARGET_PARTS,
        **operands,
    )
    return logits


def statistics(
    problem: Problem,
    rows: slice,
    targets: Tensor,
    count: bool,
    tile_lse: Tensor | None = None,
    storage: Storage | None = None,
) -> Tensor:
    """(r, 7) packed statistics of a slice of the rows, whose targets' logits are `targets`.

    tile_lse (tiles of block_n columns, r) and storage are filled where given.
    """
    tile = problem.tile("statistics" if storage is None else "stored_statistics")
    num_columns, num_rows = problem.num_columns, targets.shape[0]
    split_columns = configs.split_columns(num_columns)
    num_splits = -(-num_columns // split_columns)
    num_row_blocks = -(-num_rows // tile.block_m)
    partial = problem.empty(num_splits, PARTIAL_FIELDS, num_rows)
    schedule = problem.schedule(tile, num_columns)
    grid = (min(num_row_blocks * num_splits, schedule["NUM_PROGRAMS"]),)
    _start(
        statistics_kernel,
        grid,
        target_logits=targets,
        partial=partial,
        tile_lse=partial if tile_lse is None else tile_lse,
        exponentials=problem.hidden
        if storage is None
        else problem.target(storage.exponentials, tile),
        references=partial if storage is None else storage.references,
        num_columns=num_columns,
        num_row_blocks=num_row_blocks,
        num_splits=num_splits,
        split_columns=split_columns,
        exponentials_stride=0 if storage is None else storage.exponentials.stride(0),
        lowest=problem.lowest,
        COUNT=count,
        TILE_LSE=tile_lse is not None,
        STORE=storage is not None,
        HEADROOM=None if storage is None else storage.headroom,
        STORE_SCALE=1.0 if storage is None else storage.scale,
        **schedule,
        **problem.operands(tile, rows, slice(None)),
    )
    packed = problem.empty(num_rows, PACKED_FIELDS)
    _start(
        merge_kernel,
        (-(-num_rows // MERGE_ROWS),),
        partial,
        problem.columns[rows],
        targets,
        packed,
        num_rows,
        num_columns,
        num_splits,
        split_columns,
        problem.lowest,
        ACCUMULATOR=problem.accumulator,
        BLOCK_R=MERGE_ROWS,
        num_warps=MERGE_WARPS,
        **OPTIONS,
    )
    return packed


class Coefficients(NamedTuple):
    """values (6, r) of the rows' dz (see triton._gradients), and which terms there are."""

    values: Tensor
    has_entropy: bool
    has_constant: bool

    def arguments(self, problem: Problem) -> dict[str, Any]:
        """What both kernels of the logits' gradients share."""
        head = problem.head
        return {
            "coefficients": self.values,
            "softcap": 1.0 if head.softcap is None else head.softcap,
            "temperature": head.temperature,
            "ACCUMULATOR": problem.accumulator,
            "CAPPED": head.softcap is not None,
            "HAS_ENTROPY": self.has_entropy,
            "HAS_CONSTANT": self.has_constant,
        }


def logit_gradients(
    problem: Problem,
    columns: slice,
    coefficients: Coefficients,
    live: Tensor | None,
    gradients: Tensor,
) -> None:
    """Fill gradients (R, C) of a slice of the columns; where `live` is False nothing is written."""
    tile = problem.tile("gradients")
    num_rows, num_columns = gradients.shape
    num_row_blocks = -(-num_rows // tile.block_m)
    num_column_blocks = -(-num_columns // tile.block_n)
    schedule = problem.schedule(tile, num_columns)
    blocks = problem.columns if live is None else live.to(torch.int8)
    grid = (min(num_row_blocks * num_column_blocks, schedule["NUM_PROGRAMS"]),)
    _start(
        logit_gradients_kernel,
        grid,
        columns=problem.columns,
        live_blocks=blocks,
        gradients=problem.target(gradients, tile),
        num_columns=num_columns,
        first_column_id=columns.start,
        num_row_blocks=num_row_blocks,
        num_column_blocks=num_column_blocks,
        live_stride=blocks.stride(0),
        gradients_stride=gradients.stride(0),
        HAS_LIVE=live is not None,
        SKIP_ROWS=SKIP_ROWS,
        SKIP_COLUMNS=SKIP_COLUMNS,
        **schedule,
        **(problem.operands(tile, slice(None), columns) | coefficients.arguments(problem)),
    )


def stored_gradients(
    problem: Problem, rows: slice, coefficients: Coefficients, storage: Storage
) -> None:
    """Turn the stored exponentials of a slice of the rows into the gradients of their logits."""
    num_rows, num_columns = storage.exponentials.shape
    grid = (-(-num_rows // STORED_ROWS), storage.references.shape[0])
    _start(
        stored_gradients_kernel,
        grid,
        stored=storage.exponentials,
        references=storage.references,
        columns=problem.columns[rows],
        num_rows=num_rows,
        num_columns=num_columns,
        stored_stride=storage.exponentials.stride(0),
        LOG_STORE_SCALE=math.log(storage.scale),
        BLOCK_R=STORED_ROWS,
        WIDTH=storage.width,
        num_warps=STORED_WARPS,
        **coefficients.arguments(problem),
        **OPTIONS,
    )


def live_product(
    problem: Problem,
    left: Tensor,
    right: Tensor,
    live: Tensor,
    result: Tensor,
    skip: tuple[int, int],
    accumulate: bool,
) -> None:
    """result = or += left @ right over the live blocks of left, of `skip` rows and columns."""
    tile = configs.product_tile(problem.family, left.dtype)
    indices = live.logical_not().argsort(dim=1, stable=True).to(torch.int32).contiguous()
    size_m, size_n = result.shape
    grid = (-(-size_m // tile.block_m), -(-size_n // tile.block_n))
    _start(
        live_product_kernel,
        grid,
        left,
        right,
        result,
        indices,
        live.sum(dim=1, dtype=torch.int32),
        size_m,
        size_n,
        left.shape[1],
        indices.stride(0),
        *left.stride(),
        *right.stride(),
        result.stride(0),
        ACCUMULATOR=problem.accumulator,
        ACCUMULATE=accumulate,
        SKIP_M=skip[0],
        SKIP_K=skip[1],
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **OPTIONS,
    )


def _start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    kernel[grid](*arguments, **options)
