"""One function for each kernel of the backward pass: grid, tile and arguments; as in launch."""

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
from s2srm_kernels.triton.backward import (
    logit_gradients_kernel,
    scale_kernel,
    set_targets_kernel,
    stored_gradients_kernel,
)
from s2srm_kernels.triton.launch import Storage
from s2srm_kernels.triton.problem import OPTIONS, Problem, programs_on, start

STORED_ROWS = 16
STORED_WARPS = 4
SET_ROWS = 256
SCALE_BLOCK = 8192
SCALE_WARPS = 8


class Coefficients(NamedTuple):
    """values (6, r) of the rows' dz (see backward), and which terms there are."""

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
    """Fill gradients (R, C) of a slice of the columns, with zeros where `live` is False."""
    tile = problem.tile("gradients")
    num_rows, num_columns = gradients.shape
    num_row_blocks = -(-num_rows // tile.block_m)
    num_column_blocks = -(-num_columns // tile.block_n)
    schedule = problem.schedule(tile, num_columns)
    blocks = problem.columns if live is None else live.to(torch.int8)
    grid = (min(num_row_blocks * num_column_blocks, schedule["NUM_PROGRAMS"]),)
    start(
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
    start(
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
        WIDTH=storage.tile.block_n,
        num_warps=STORED_WARPS,
        **coefficients.arguments(problem),
        **OPTIONS,
    )


def set_targets(problem: Problem, rows: slice, values: Tensor, matrix: Tensor) -> None:
    """matrix[i, target of i] = values[i] of a slice of the rows."""
    num_rows = values.shape[0]
    start(
        set_targets_kernel,
        (-(-num_rows // SET_ROWS),),
        matrix,
        problem.columns[rows],
        values,
        num_rows,
        matrix.stride(0),
        BLOCK_R=SET_ROWS,
        num_warps=4,
        **OPTIONS,
    )


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, 0-d of the compute dtype; it is neither read nor written if that is 1."""
    size, programs = gradient.numel(), 8 * programs_on(gradient.device)
    start(
        scale_kernel,
        (min(programs, -(-size // SCALE_BLOCK)),),
        gradient,
        factor,
        size,
        BLOCK=SCALE_BLOCK,
        NUM_PROGRAMS=programs,
        num_warps=SCALE_WARPS,
        **OPTIONS,
    )
