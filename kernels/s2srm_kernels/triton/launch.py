"""One function for each kernel: grid, tile and arguments.

Slices of rows and columns are those of a `Problem`; every buffer belongs to the caller.
"""

# torch and triton annotate their functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false
from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from s2srm_kernels.lm_head.engine import SKIP_COLUMNS, Wanted
from s2srm_kernels.triton import configs
from s2srm_kernels.triton.configs import Tile
from s2srm_kernels.triton.forward import statistics_kernel, target_logits_kernel
from s2srm_kernels.triton.merge import add_kernel, merge_kernel
from s2srm_kernels.triton.problem import OPTIONS, Problem, start

# Pieces of the tile of targets: a bit is the same in any number of them.
TARGET_PARTS = 4
MERGE_ROWS = 32
MERGE_WARPS = 1
ADD_WARPS = 4
PARTIAL_FIELDS = 6
PACKED_FIELDS = 7
# A row whose sum relative to its target's logit is larger than e^40 is made again: up to there
# e^(z - z_target), and the factor of the row that makes up for it, are far from the ends of what
# bfloat16 can hold.
FAR = math.exp(40)


class Storage(NamedTuple):
    """What the statistics store for the gradients of the same rows.

    exponentials (r, V): e^(z - reference) * scale in the inputs' dtype. references: of each row and
    each of the storing kernel's tiles of columns (tiles, r), or of each row (r,).
    """

    exponentials: Tensor
    references: Tensor
    tile: Tile
    scale: float

    @classmethod
    def allocate(cls, problem: Problem, num_rows: int, fixed: bool, wanted: Wanted) -> Storage:
        """Uninitialised buffers; the rows of `exponentials` begin at multiples of 256 entries."""
        sums = wanted.entropy or wanted.mean
        tile = problem.tile("stored_sums" if sums else "stored_statistics")
        exponentials = problem.hidden.new_empty(num_rows, storage_stride(problem.num_columns))[
            :, : problem.num_columns
        ]
        num_tiles = -(-problem.num_columns // tile.block_n)
        references = problem.empty(*(() if fixed else (num_tiles,)), num_rows)
        # float16 ends at 65504: small exponentials are moved up from the subnormals.
        scale = 2.0**15 if problem.hidden.dtype == torch.float16 else 1.0
        return cls(exponentials, references, tile, scale)

    def rows(self, count: int) -> Storage:
        """The same for the first `count` rows alone."""
        shape = (*self.references.shape[:-1], count)
        references = self.references.flatten()[: math.prod(shape)].view(shape)
        return self._replace(exponentials=self.exponentials[:count], references=references)


def storage_stride(num_columns: int) -> int:
    """Entries from row to row of a matrix of logit gradients: products like aligned rows."""
    return -(-num_columns // SKIP_COLUMNS) * SKIP_COLUMNS


def target_logits(problem: Problem, columns: Tensor | None = None) -> Tensor:
    """(R,) logits at the targets or at int32 `columns`, -inf where that is -1."""
    logits = problem.empty(problem.num_rows)
    # The targets' columns are gathered: no descriptor, and the tile that goes without.
    tile = problem.tile("statistics", descriptors=False)
    operands = problem.operands(tile, slice(None), slice(None), pointers=True)
    grid = (-(-problem.num_rows // tile.block_m), -(-tile.block_m // tile.block_n))
    start(
        target_logits_kernel,
        grid,
        columns=problem.columns if columns is None else columns,
        logits=logits,
        PARTS=TARGET_PARTS,
        **operands,
    )
    return logits


def statistics(
    problem: Problem,
    rows: slice,
    targets: Tensor,
    wanted: Wanted,
    count: bool = False,
    tile_lse: Tensor | None = None,
    storage: Storage | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """(r, 7) packed statistics of a slice of the rows, whose targets' logits are `targets`.

    tile_lse (tiles of block_n columns, r) and storage are filled where given. active: see
    statistics_kernel; in other blocks of rows the result is unset.
    """
    tile = problem.tile("statistics") if storage is None else storage.tile
    num_rows, num_columns = targets.shape[0], problem.num_columns
    fields = {"ARGMAX": wanted.maximum, "COUNT": count}
    fields |= {"ENTROPY": wanted.entropy, "MEAN": wanted.mean}
    if active is None:
        active = all_active(problem, tile, num_rows)
    partial = _partial(problem, rows, targets, targets, tile, active, storage, tile_lse, fields)
    packed = problem.empty(num_rows, PACKED_FIELDS)
    start(
        merge_kernel,
        (-(-num_rows // MERGE_ROWS),),
        partial,
        problem.columns[rows],
        targets,
        packed,
        num_rows,
        num_columns,
        partial.shape[0],
        configs.split_columns(num_columns),
        problem.lowest,
        ACCUMULATOR=problem.accumulator,
        BLOCK_R=MERGE_ROWS,
        num_warps=MERGE_WARPS,
        **fields,
        **OPTIONS,
    )
    return packed


def exponentials(
    problem: Problem, rows: slice, targets: Tensor, entropy: bool, storage: Storage
) -> Tensor:
    """Store e^(z - reference), times the softcap's slope, of a slice of the rows.

    storage.references (r,) becomes each row's target's logit or, where the row has more than FAR
    times its mass, the row's maximum. Such rows are made again with their block, without waiting
    for the device: where there are none, the kernels end at once. A row's bits do not depend on the
    others in its block. Returns (r, 7) packed statistics whose field 0 is the reference; entropy:
    field 2 is made too.
    """
    tile = storage.tile
    num_rows = targets.shape[0]
    storage.references.copy_(targets)
    far = torch.empty(num_rows, dtype=torch.int8, device=targets.device)
    again = torch.zeros(1 + -(-num_rows // tile.block_m), dtype=torch.int32, device=targets.device)
    packed = problem.empty(num_rows, PACKED_FIELDS)
    fields = {"ARGMAX": False, "COUNT": False, "ENTROPY": entropy, "MEAN": False}
    active = all_active(problem, tile, num_rows)
    partial = None
    for first in (True, False):
        if not first:
            active = again
            maxima = statistics(problem, rows, targets, Wanted(False, False, False), active=again)
            references = torch.where(far != 0, maxima[:, 0], targets)
            storage.references.copy_(references)
        partial = _partial(
            *(problem, rows, targets, storage.references, tile, active, storage, None, fields),
            partial,
        )
        start(
            add_kernel,
            (-(-num_rows // tile.block_m),),
            partial,
            targets,
            storage.references,
            packed,
            far,
            again,
            num_rows,
            partial.shape[0],
            problem.lowest,
            FAR,
            ACCUMULATOR=problem.accumulator,
            ENTROPY=entropy,
            FAST=problem.fast,
            FIRST=first,
            BLOCK_R=tile.block_m,
            num_warps=ADD_WARPS,
            **OPTIONS,
        )
    return packed


def all_active(problem: Problem, tile: Tile, num_rows: int) -> Tensor:
    """Work for every block of rows; see statistics_kernel."""
    size = 1 + -(-num_rows // tile.block_m)
    return torch.ones(size, dtype=torch.int32, device=problem.hidden.device)


def _partial(
    problem: Problem,
    rows: slice,
    targets: Tensor,
    fixed_references: Tensor,
    tile: Tile,
    active: Tensor,
    storage: Storage | None,
    tile_lse: Tensor | None,
    fields: dict[str, bool],
    partial: Tensor | None = None,
) -> Tensor:
    """(splits, 6, r) partial results of the active blocks of rows, written to `partial` if given.

    Relative to fixed_references where the storage has one reference a row.
    """
    num_rows, num_columns = targets.shape[0], problem.num_columns
    split_columns = configs.split_columns(num_columns)
    num_splits = -(-num_columns // split_columns)
    num_row_blocks = -(-num_rows // tile.block_m)
    if partial is None:
        partial = problem.empty(num_splits, PARTIAL_FIELDS, num_rows)
    fixed = storage is not None and storage.references.dim() == 1
    if os.environ.get("S2SRM_HOPPER") == "1" and tile_lse is None:
        # Gluon is an experimental part of Triton: imported by those alone who ask for it.
        from s2srm_kernels.triton import hopper

        if hopper.serves(problem, fields, fixed, storage is not None):
            holds_target = _holds_target(problem, rows, hopper.TILE, num_row_blocks)
            arguments = {
                "columns": problem.columns[rows],
                "target_logits": targets,
                "fixed_references": fixed_references,
                "active": active,
                "holds_target": holds_target,
                "partial": partial,
                "num_tiles": holds_target.shape[1],
            }
            stored = None if storage is None else storage.exponentials
            hopper.launch(problem, rows, stored, fields, split_columns, arguments)
            return partial
    holds_target = _holds_target(problem, rows, tile, num_row_blocks)
    schedule = problem.schedule(tile, num_columns)
    start(
        statistics_kernel,
        (min(num_row_blocks * num_splits, schedule["NUM_PROGRAMS"]),),
        columns=problem.columns[rows],
        target_logits=targets,
        fixed_references=fixed_references,
        active=active,
        holds_target=holds_target,
        partial=partial,
        tile_lse=partial if tile_lse is None else tile_lse,
        exponentials=problem.hidden
        if storage is None
        else problem.target(storage.exponentials, tile),
        references=partial if storage is None else storage.references,
        num_columns=num_columns,
        num_row_blocks=num_row_blocks,
        num_splits=num_splits,
        num_tiles=holds_target.shape[1],
        split_columns=split_columns,
        exponentials_stride=0 if storage is None else storage.exponentials.stride(0),
        lowest=problem.lowest,
        FIXED=fixed,
        TILE_LSE=tile_lse is not None,
        STORE=storage is not None,
        STORE_SCALE=1.0 if storage is None else storage.scale,
        **fields,
        **schedule,
        **problem.operands(tile, rows, slice(None)),
    )
    return partial


def _holds_target(problem: Problem, rows: slice, tile: Tile, num_row_blocks: int) -> Tensor:
    """(row blocks, tiles of columns) int32: bit i where a row has its target in the i-th part."""
    columns = problem.columns[rows].long()
    width = tile.block_n // tile.parts
    num_tiles = -(-problem.num_columns // tile.block_n)
    size = num_row_blocks * num_tiles * tile.parts
    block = torch.arange(columns.shape[0], device=columns.device) // tile.block_m
    # Another rank's target goes into an entry behind the last.
    place = block * (num_tiles * tile.parts) + columns // width
    place = torch.where(columns < 0, size, place)
    holds = torch.zeros(size + 1, dtype=torch.int32, device=columns.device)
    holds.scatter_(0, place, 1)
    bits = 2 ** torch.arange(tile.parts, dtype=torch.int32, device=columns.device)
    holds = holds[:size].view(num_row_blocks, num_tiles, tile.parts) * bits
    return holds.sum(dim=2, dtype=torch.int32)
