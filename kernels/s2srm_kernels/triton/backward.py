"""Kernels of the backward pass: the gradients with respect to the logits, (rows, columns).

    dz_j = p_j * (a - b * log p_j) + c        log p_j = (z_j - max) - log_sum

then times the softcap's slope; a, b, c are per row and carry the temperature. The target's entry
comes ready made (see _engine): a confident target, whose p is nearly 1, keeps its digits. dz is
rounded once, to the dtype of the inputs, and goes into the products from there.

`logit_gradients_kernel` makes the logits again; `stored_gradients_kernel` turns what the statistics
stored, e^(z - reference), into dz in place. Where dz is proportional to p but for the target's
entry, `set_targets_kernel` is all that is left to do: see engine. No atomics.
"""

# "fp64": Triton would round the argument to float32 before a float64 kernel sees it.
# ruff: noqa: F821
# A kernel is written in Triton's language, which a checker of Python does not know.
# pyright: basic, reportArgumentType=false, reportInvalidTypeForm=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOptionalOperand=false, reportCallIssue=false, reportUndefinedVariable=false
import triton
import triton.language as tl

from s2srm_kernels.triton.tiles import (
    FLOOR,
    dot_tile,
    exp,
    finish_logits,
    locate,
    slope_of,
    split_tile,
    store_part,
)

# Rows of the (6, R) coefficients.
MAXIMUM = tl.constexpr(0)
LOG_SUM = tl.constexpr(1)
LINEAR = tl.constexpr(2)
ENTROPY = tl.constexpr(3)
CONSTANT = tl.constexpr(4)
AT_TARGET = tl.constexpr(5)
NUM_COEFFICIENTS = 6


@triton.jit
def entries(
    p,
    logp,
    columns,
    target,
    coefficients,
    num_rows,
    softcap,
    temperature,
    HAS_ENTROPY: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """p and log p of a part of a tile -> its dz; coefficients points at the rows' maxima."""
    linear = tl.load(coefficients + LINEAR * num_rows)[:, None]
    if HAS_ENTROPY:
        slope = tl.load(coefficients + ENTROPY * num_rows)[:, None]
        # p is 0 where log p is below the floor: 0 * -inf would be NaN.
        dz = p * (linear - slope * tl.maximum(logp, FLOOR))
    else:
        dz = p * linear
    if HAS_CONSTANT:
        dz += tl.load(coefficients + CONSTANT * num_rows)[:, None]
    if CAPPED:
        row_lse = tl.load(coefficients) + tl.load(coefficients + LOG_SUM * num_rows)
        dz *= slope_of(logp + row_lse[:, None], softcap, temperature)
    at_target = tl.load(coefficients + AT_TARGET * num_rows)
    return tl.where(columns[None, :] == target[:, None], at_target[:, None], dz)


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_columns",
        "first_column_id",
        "num_row_blocks",
        "num_column_blocks",
        "live_stride",
    ]
)
def logit_gradients_kernel(
    hidden,
    weight,
    bias,
    columns,
    coefficients,
    live_blocks,
    gradients,
    num_rows,
    num_columns,
    first_column_id,
    depth,
    num_row_blocks,
    num_column_blocks,
    hidden_stride,
    weight_stride_v,
    weight_stride_d,
    live_stride,
    gradients_stride,
    softcap: "fp64",
    temperature: "fp64",
    ACCUMULATOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    FAST: tl.constexpr,
    SKIP_ROWS: tl.constexpr,
    SKIP_COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    """gradients (R, C) of the C columns from first_column_id on, which weight and bias begin with.

    HAS_LIVE: a block that is not live is zeros, and nothing is multiplied for it.
    """
    width: tl.constexpr = BLOCK_N // PARTS
    num_items = num_row_blocks * num_column_blocks
    for item in tl.range(tl.program_id(0), num_items, NUM_PROGRAMS):
        row_block, column_block = locate(item, num_row_blocks, num_column_blocks, GROUP)
        first_row = row_block * BLOCK_M
        first_column = column_block * BLOCK_N
        wanted = True
        if HAS_LIVE:
            block = (first_row // SKIP_ROWS) * live_stride + first_column // SKIP_COLUMNS
            wanted = tl.load(live_blocks + block) != 0
        if wanted:
            rows = first_row + tl.arange(0, BLOCK_M)
            within = tl.minimum(rows, num_rows - 1)
            products = dot_tile(
                hidden,
                weight,
                first_row,
                first_column,
                within,
                tl.minimum(first_column + tl.arange(0, BLOCK_N), num_columns - 1),
                depth,
                hidden_stride,
                weight_stride_v,
                weight_stride_d,
                ACCUMULATOR,
                TMA,
                EVEN_K,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
            parts = split_tile(products, BLOCK_M, BLOCK_N, PARTS)
            target = tl.load(columns + within) - first_column_id
            for i in tl.static_range(PARTS):
                part_columns = first_column + i * width + tl.arange(0, width)
                bounded = part_columns if EVEN_N else tl.minimum(part_columns, num_columns - 1)
                z = finish_logits(
                    parts[i], bias, bounded, softcap, temperature, HAS_BIAS, CAPPED, SCALED, FAST
                )
                of_row = coefficients + within
                logp = z - tl.load(of_row)[:, None]
                logp -= tl.load(of_row + LOG_SUM * num_rows)[:, None]
                dz = entries(
                    exp(logp, FAST),
                    logp,
                    part_columns,
                    target,
                    of_row,
                    num_rows,
                    softcap,
                    temperature,
                    HAS_ENTROPY,
                    HAS_CONSTANT,
                    CAPPED,
                )
                store_part(
                    gradients,
                    dz,
                    first_row,
                    first_column + i * width,
                    num_rows,
                    num_columns,
                    gradients_stride,
                    TMA,
                )
        else:
            nothing = tl.zeros((BLOCK_M, width), dtype=ACCUMULATOR)
            for i in tl.static_range(PARTS):
                store_part(
                    gradients,
                    nothing,
                    first_row,
                    first_column + i * width,
                    num_rows,
                    num_columns,
                    gradients_stride,
                    TMA,
                )


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def stored_gradients_kernel(
    stored,
    references,
    columns,
    coefficients,
    num_rows,
    num_columns,
    stored_stride,
    softcap: "fp64",
    temperature: "fp64",
    ACCUMULATOR: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    LOG_STORE_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """e^(z - reference) * STORE_SCALE -> dz, in place; WIDTH columns share a reference."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(1)
    part_columns = part * WIDTH + tl.arange(0, WIDTH)
    live = rows < num_rows
    within = tl.minimum(rows, num_rows - 1)
    place = stored + rows.to(tl.int64)[:, None] * stored_stride + part_columns[None, :]
    mask = live[:, None] & (part_columns < num_columns)[None, :]
    of_row = coefficients + within
    reference = tl.load(references + part.to(tl.int64) * num_rows + within)
    offset = (reference - tl.load(of_row)) - tl.load(of_row + LOG_SUM * num_rows)
    value = tl.load(place, mask=mask, other=0.0).to(ACCUMULATOR)
    offset = (offset - LOG_STORE_SCALE)[:, None]
    dz = entries(
        value * exp(offset, False),
        # An exponential of 0 has no mass: any logit will do.
        tl.log(tl.maximum(value, 1e-37)) + offset,
        part_columns,
        tl.load(columns + within),
        of_row,
        num_rows,
        softcap,
        temperature,
        HAS_ENTROPY,
        HAS_CONSTANT,
        CAPPED,
    )
    tl.store(place, dz.to(stored.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def set_targets_kernel(
    matrix,
    columns,
    values,
    num_rows,
    matrix_stride,
    BLOCK_R: tl.constexpr,
):
    """matrix[i, columns[i]] = values[i]; a row whose column is below 0 is left as it is."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < num_rows
    column = tl.load(columns + rows, mask=live, other=-1)
    values = tl.load(values + rows, mask=live, other=0.0)
    place = matrix + rows.to(tl.int64) * matrix_stride + column
    tl.store(place, values.to(matrix.dtype.element_ty), mask=live & (column >= 0))


@triton.jit
def scale_kernel(gradient, factor, size, BLOCK: tl.constexpr, NUM_PROGRAMS: tl.constexpr):
    """gradient (size,) *= factor (0-d), rounded once; untouched where the factor is 1."""
    by = tl.load(factor)
    if by != 1:
        for start in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, size, NUM_PROGRAMS * BLOCK):
            place = start + tl.arange(0, BLOCK)
            value = tl.load(gradient + place, mask=place < size)
            value = value.to(by.dtype) * by
            tl.store(gradient + place, value.to(gradient.dtype.element_ty), mask=place < size)
