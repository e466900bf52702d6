"""Kernels of the forward pass: row statistics in one pass over the vocabulary.

A program takes one block of rows and one split of the columns, walks over the split's tiles with
the statistics in registers, and writes one partial result per row. A second kernel merges the
splits in their order: no atomics, and nothing depends on the number of rows.

Left out: splits chosen by the number of rows, which would give a row other bits in another batch.
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
    combine,
    dot_tile,
    exp,
    finish_logits,
    locate,
    part_statistics,
    split_tile,
)

# Of a partial result: max, rest, weighted, shift, argmax, above.
FIELDS = tl.constexpr(6)


@triton.jit(do_not_specialize=["num_rows"])
def target_logits_kernel(
    hidden,
    weight,
    bias,
    columns,
    logits,
    num_rows,
    depth,
    hidden_stride,
    weight_stride_v,
    weight_stride_d,
    softcap: "fp64",
    temperature: "fp64",
    ACCUMULATOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    FAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The diagonal of a tile whose columns are the rows' own targets; -inf where not owned."""
    first_row = tl.program_id(0) * BLOCK_M
    part = tl.program_id(1) * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M)
    # Column n of the tile is the target of row part + n (modulo the tile's rows).
    diagonal = (part + tl.arange(0, BLOCK_N)) % BLOCK_M
    owners = tl.minimum(first_row + diagonal, num_rows - 1)
    targets = tl.maximum(tl.load(columns + owners), 0)
    products = dot_tile(
        hidden,
        weight,
        0,
        0,
        tl.minimum(rows, num_rows - 1),
        targets,
        depth,
        hidden_stride,
        weight_stride_v,
        weight_stride_d,
        ACCUMULATOR,
        False,
        EVEN_K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    parts = split_tile(products, BLOCK_M, BLOCK_N, PARTS)
    width: tl.constexpr = BLOCK_N // PARTS
    own = tl.arange(0, BLOCK_M)
    found = tl.full((BLOCK_M,), float("-inf"), ACCUMULATOR)
    for i in tl.static_range(PARTS):
        diagonal = (part + i * width + tl.arange(0, width)) % BLOCK_M
        owners = tl.minimum(first_row + diagonal, num_rows - 1)
        targets = tl.maximum(tl.load(columns + owners), 0)
        z = finish_logits(
            parts[i], bias, targets, softcap, temperature, HAS_BIAS, CAPPED, SCALED, FAST
        )
        z = tl.where(own[:, None] == diagonal[None, :], z, float("-inf"))
        found = tl.maximum(found, tl.max(z, axis=1))
    here = (own >= part) & (own < part + BLOCK_N) & (rows < num_rows)
    owned = tl.load(columns + rows, mask=here, other=-1) >= 0
    tl.store(logits + rows, tl.where(owned, found, float("-inf")), mask=here)


@triton.jit(do_not_specialize=["num_rows", "num_row_blocks"])
def statistics_kernel(
    hidden,
    weight,
    bias,
    target_logits,
    partial,
    tile_lse,
    exponentials,
    references,
    num_rows,
    num_columns,
    depth,
    num_row_blocks,
    num_splits,
    split_columns,
    hidden_stride,
    weight_stride_v,
    weight_stride_d,
    exponentials_stride,
    softcap: "fp64",
    temperature: "fp64",
    lowest: "fp64",
    ACCUMULATOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    COUNT: tl.constexpr,
    TILE_LSE: tl.constexpr,
    STORE: tl.constexpr,
    FAST: tl.constexpr,
    HEADROOM: tl.constexpr,
    STORE_SCALE: tl.constexpr,
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
    """partial (splits, 6, R): max, rest, weighted, shift, argmax, above, as in the merge.

    COUNT: number of logits above target_logits. TILE_LSE: tile_lse (T, R), the log-sum-exp of every
    BLOCK_N columns. STORE: exponentials (R, V), e^(z - reference) * STORE_SCALE, for the gradients
    of the same call; the reference of a row is its target_logits, or where a part of a tile
    (BLOCK_N / PARTS columns) exceeds that by more than HEADROOM the part's maximum, and is written
    to references (parts, R).
    """
    width: tl.constexpr = BLOCK_N // PARTS
    floor = tl.full((BLOCK_M,), lowest, ACCUMULATOR)
    num_items = num_row_blocks * num_splits
    for item in tl.range(tl.program_id(0), num_items, NUM_PROGRAMS):
        row_block, split = locate(item, num_row_blocks, num_splits, GROUP)
        first_row = row_block * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        live = rows < num_rows
        within = tl.minimum(rows, num_rows - 1)
        start = split * split_columns
        maximum, rest = floor, tl.full((BLOCK_M,), -1.0, ACCUMULATOR)
        weighted = tl.zeros((BLOCK_M,), dtype=ACCUMULATOR)
        sum_shift = weighted
        above = tl.zeros((BLOCK_M,), dtype=tl.int32)
        argmax = above + start
        for first_column in tl.range(
            start, tl.minimum(start + split_columns, num_columns), BLOCK_N
        ):
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
            if TILE_LSE:
                tile_maximum, tile_sum = floor, tl.zeros((BLOCK_M,), dtype=ACCUMULATOR)
            for i in tl.static_range(PARTS):
                first = first_column + i * width
                # Always so where V fills the tiles: but a branch keeps the compiler from mixing the
                # parts, which would take more registers than there are.
                if first < num_columns:
                    part_columns = tl.arange(0, width)
                    remaining = num_columns - first
                    if not EVEN_N:
                        bounded = first + tl.minimum(part_columns, remaining - 1)
                    else:
                        bounded = first + part_columns
                    z = finish_logits(
                        parts[i],
                        bias,
                        bounded,
                        softcap,
                        temperature,
                        HAS_BIAS,
                        CAPPED,
                        SCALED,
                        FAST,
                    )
                    if not EVEN_N:
                        z = tl.where((part_columns < remaining)[None, :], z, float("-inf"))
                    if COUNT:
                        threshold = tl.load(target_logits + within)
                        above += tl.sum((z > threshold[:, None]).to(tl.int32), axis=1)
                    reference = floor
                    if STORE:
                        reference = tl.load(target_logits + within)
                    top, others, part_weighted, part_shift, part_argmax, reference, stored = (
                        part_statistics(
                            z,
                            part_columns,
                            floor,
                            reference,
                            remaining,
                            HEADROOM,
                            not EVEN_N,
                            HAS_BIAS or not EVEN_N,
                            FAST,
                        )
                    )
                    if TILE_LSE:
                        bigger = tl.maximum(tile_maximum, top)
                        tile_sum = tile_sum * exp(tile_maximum - bigger, False)
                        tile_sum += (1 + others) * exp(top - bigger, False)
                        tile_maximum = bigger
                    if STORE:
                        scaled = stored * STORE_SCALE
                        place = references + (first // width) * num_rows.to(tl.int64) + rows
                        tl.store(place, reference, mask=live)
                        if TMA:
                            exponentials.store([first_row, first], scaled.to(exponentials.dtype))
                        else:
                            place = exponentials + rows.to(tl.int64)[:, None] * exponentials_stride
                            place += first + part_columns[None, :]
                            mask = live[:, None] & (part_columns < remaining)[None, :]
                            tl.store(place, scaled.to(exponentials.dtype.element_ty), mask=mask)
                    maximum, rest, weighted, sum_shift, argmax = combine(
                        maximum,
                        rest,
                        weighted,
                        sum_shift,
                        argmax,
                        first - start,
                        top,
                        others,
                        part_weighted,
                        part_shift,
                        part_argmax + first,
                        tl.minimum(remaining, width),
                    )
            if TILE_LSE:
                place = tile_lse + (first_column // BLOCK_N) * num_rows.to(tl.int64) + rows
                tl.store(place, tile_maximum + tl.log(tile_sum), mask=live)
        place = partial + split * FIELDS * num_rows.to(tl.int64) + rows
        tl.store(place, maximum, mask=live)
        tl.store(place + num_rows, rest, mask=live)
        tl.store(place + 2 * num_rows, weighted, mask=live)
        tl.store(place + 3 * num_rows, sum_shift, mask=live)
        tl.store(place + 4 * num_rows, argmax.to(ACCUMULATOR), mask=live)
        tl.store(place + 5 * num_rows, above.to(ACCUMULATOR), mask=live)


@triton.jit(do_not_specialize=["num_rows"])
def merge_kernel(
    partial,
    columns,
    target_logits,
    packed,
    num_rows,
    num_columns,
    num_splits,
    split_columns,
    lowest: "fp64",
    ACCUMULATOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """(splits, 6, R) partial results -> (R, 7) statistics, one split after the other."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < num_rows
    maximum = tl.full((BLOCK_R,), lowest, ACCUMULATOR)
    rest = tl.full((BLOCK_R,), -1.0, ACCUMULATOR)
    weighted = tl.zeros((BLOCK_R,), dtype=ACCUMULATOR)
    sum_shift, argmax, above = weighted, weighted, weighted
    place = partial + rows
    for split in tl.range(0, num_splits):
        first_column = split * split_columns
        maximum, rest, weighted, sum_shift, argmax = combine(
            maximum,
            rest,
            weighted,
            sum_shift,
            argmax,
            first_column,
            tl.load(place, mask=live, other=0.0),
            tl.load(place + num_rows, mask=live, other=0.0),
            tl.load(place + 2 * num_rows, mask=live, other=0.0),
            tl.load(place + 3 * num_rows, mask=live, other=0.0),
            tl.load(place + 4 * num_rows, mask=live, other=0.0),
            tl.minimum(num_columns - first_column, split_columns),
        )
        above += tl.load(place + 5 * num_rows, mask=live, other=0.0)
        place += FIELDS * num_rows
    owned = tl.load(columns + rows, mask=live, other=-1) >= 0
    target_logit = tl.load(target_logits + rows, mask=live, other=0.0)
    # The target's logit is one of those whose maximum was taken; the bound is a matter of form.
    target_logit = tl.where(owned, tl.minimum(target_logit, maximum), float("-inf"))
    packed += rows.to(tl.int64) * 7
    tl.store(packed, maximum, mask=live)
    tl.store(packed + 1, rest, mask=live)
    tl.store(packed + 2, weighted, mask=live)
    tl.store(packed + 3, sum_shift, mask=live)
    tl.store(packed + 4, target_logit, mask=live)
    tl.store(packed + 5, argmax, mask=live)
    tl.store(packed + 6, above, mask=live)
