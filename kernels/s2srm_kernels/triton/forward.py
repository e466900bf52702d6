"""Kernels of the forward pass: row statistics in one pass over the vocabulary.

A program takes one block of rows and one split of the columns, walks over the split's tiles with
the statistics in registers, and writes one partial result per row. A second kernel merges the
splits in their order: nothing depends on the number of rows. (The one atomic counts blocks of rows
in integers.)

The statistics are relative to a row's maximum so far or, FIXED, to a reference that is known before
the product, the target's logit: then there is nothing to compare and nothing to rescale, and what
is stored for the gradients is relative to one number per row.

Left out: splits chosen by the number of rows, which would give a row other bits in another batch.
"""

# "fp64": Triton would round the argument to float32 before a float64 kernel sees it.
# ruff: noqa: F821
# A kernel is written in Triton's language, which a checker of Python does not know.
# pyright: basic, reportArgumentType=false, reportInvalidTypeForm=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOptionalOperand=false, reportCallIssue=false, reportUndefinedVariable=false
# pyright: reportAssignmentType=false
import triton
import triton.language as tl

from s2srm_kernels.triton.merge import FIELDS
from s2srm_kernels.triton.tiles import (
    FLOOR,
    column_of,
    dot_tile,
    exponent,
    finish_logits,
    highest_of,
    in_nats,
    locate,
    multiply_then_add,
    power,
    rounding_of,
    scale_reference,
    slope_of,
    split_tile,
    store_part,
    without_targets,
)


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


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_columns",
        "num_row_blocks",
        "num_splits",
        "num_tiles",
    ]
)
def statistics_kernel(
    hidden,
    weight,
    bias,
    columns,
    target_logits,
    fixed_references,
    active,
    holds_target,
    partial,
    tile_lse,
    exponentials,
    references,
    num_rows,
    num_columns,
    depth,
    num_row_blocks,
    num_splits,
    num_tiles,
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
    FIXED: tl.constexpr,
    ARGMAX: tl.constexpr,
    COUNT: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    TILE_LSE: tl.constexpr,
    STORE: tl.constexpr,
    STORE_SCALE: tl.constexpr,
    FAST: tl.constexpr,
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
    """partial (splits, 6, R) of every split of the columns, see the two merges.

    A row's exponentials e are relative to its largest logit so far or, FIXED, to fixed_references
    (R,), which no logit exceeds by more than 80: near its target's logit. Their sum leaves out the
    largest's own, 1, or the target's, so that the rest keeps its digits where one has nearly all of
    the mass; not so for 16-bit inputs unless FIXED. holds_target (row blocks, T): in which parts of
    a tile a row has its target, a bit each. active: how many blocks of rows there is work for, 0 or
    more, then whether for each; the others are left alone.

    ARGMAX, COUNT (logits above target_logits), ENTROPY (sum of e times its exponent), MEAN: which
    fields are made. TILE_LSE: tile_lse (T, R), of every BLOCK_N columns. STORE: exponentials
    (R, V), e * STORE_SCALE, FIXED times the softcap's slope and with any number for the target;
    without FIXED references (T, R), what a tile's are relative to.
    """
    width: tl.constexpr = BLOCK_N // PARTS
    floor = tl.full((BLOCK_M,), lowest, ACCUMULATOR)
    zeros = tl.zeros((BLOCK_M,), dtype=ACCUMULATOR)
    lane = tl.arange(0, width)
    # Of 16-bit inputs one logit's share need not be known better than to 2^-24.
    EXACT: tl.constexpr = not (FAST or FIXED)
    num_items = num_row_blocks * num_splits
    if tl.load(active) == 0:
        num_items = 0
    for item in tl.range(tl.program_id(0), num_items, NUM_PROGRAMS):
        row_block, split = locate(item, num_row_blocks, num_splits, GROUP)
        if tl.load(active + 1 + row_block) != 0:
            first_row = row_block * BLOCK_M
            rows = first_row + tl.arange(0, BLOCK_M)
            live = rows < num_rows
            within = tl.minimum(rows, num_rows - 1)
            start = split * split_columns
            reference = floor
            if FIXED:
                reference = tl.load(fixed_references + within)
            scaled = scale_reference(reference, lowest, FAST)
            total, weighted, sum_shift = zeros, zeros, zeros
            if EXACT:
                total -= 1
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
                holds = tl.load(holds_target + row_block * num_tiles + first_column // BLOCK_N)
                remaining = num_columns - first_column
                z = ()
                for i in tl.static_range(PARTS):
                    ids = first_column + tl.minimum(i * width + lane, remaining - 1)
                    part = finish_logits(
                        parts[i], bias, ids, softcap, temperature, HAS_BIAS, CAPPED, SCALED, FAST
                    )
                    if not EVEN_N:
                        here = (i * width + lane < remaining)[None, :]
                        part = tl.where(here, part, float("-inf"))
                    z += (part,)
                if COUNT:
                    threshold = tl.load(target_logits + within)[:, None]
                    # Of floats: a comparison and an addition, where integers take three.
                    counts = tl.zeros((BLOCK_M, width), dtype=tl.float32)
                    for i in tl.static_range(PARTS):
                        counts += tl.where(z[i] > threshold, 1.0, 0.0)
                    above += tl.sum(counts, axis=1).to(tl.int32)
                if FIXED:
                    holds = tl.load(holds_target + row_block * num_tiles + first_column // BLOCK_N)
                    if holds != 0:
                        target = tl.load(columns + within) - first_column
                        z = without_targets(z, holds, target, reference - 1000, PARTS, width)
                else:
                    highest = highest_of(z, PARTS)
                    top = tl.max(highest, axis=1)
                    higher = top > reference
                    if ARGMAX or EXACT:
                        column = column_of(z, highest, top, PARTS, width)
                        argmax = tl.where(higher, first_column + column, argmax)
                    before = scaled
                    reference = tl.maximum(reference, top)
                    scaled = scale_reference(reference, lowest, FAST)
                    delta = tl.maximum(before - scaled, FLOOR)
                    decay = power(delta, FAST)
                    if MEAN:
                        sum_shift += (first_column - start) * (before - scaled)
                    if EXACT:
                        weighted = decay * (weighted + (total + 1) * delta)
                        e_top = power(tl.maximum(top - reference, FLOOR), FAST)
                        total = tl.where(higher, (total + 1) * decay, total + e_top)
                    else:
                        weighted = decay * (weighted + total * delta)
                        total *= decay
                sums = tl.zeros((BLOCK_M, width), dtype=ACCUMULATOR)
                weighted_sums, shifts = sums, sums
                for i in tl.static_range(PARTS):
                    first = first_column + i * width
                    if EVEN_N or first < num_columns:
                        x = exponent(z[i], scaled, FAST)
                        if MEAN:
                            here = (i * width + lane < remaining)[None, :]
                            shifts += tl.where(here, x, 0.0)
                        if HAS_BIAS or not EVEN_N:
                            # A logit may be -inf.
                            x = tl.maximum(x, FLOOR)
                        e = power(x, FAST)
                        if STORE:
                            stored = e * STORE_SCALE
                            if FIXED and CAPPED:
                                stored *= slope_of(z[i], softcap, temperature)
                            store_part(
                                exponentials,
                                stored,
                                first_row,
                                first,
                                num_rows,
                                num_columns,
                                exponentials_stride,
                                TMA,
                            )
                        if ENTROPY:
                            weighted_sums = multiply_then_add(e, x, weighted_sums)
                        if EXACT:
                            e = tl.where(column[:, None] == (i * width + lane)[None, :], 0.0, e)
                        sums += e
                tile_sum = tl.sum(sums, axis=1)
                total += tile_sum
                if ENTROPY:
                    weighted += tl.sum(weighted_sums, axis=1)
                if MEAN:
                    sum_shift += tl.sum(shifts, axis=1)
                place = (first_column // BLOCK_N) * num_rows.to(tl.int64) + rows
                if TILE_LSE:
                    if EXACT:
                        tile_sum += e_top
                    growth = power(rounding_of(scaled, reference, FAST), FAST)
                    tl.store(tile_lse + place, reference + tl.log(growth * tile_sum), mask=live)
                if STORE and not FIXED:
                    tl.store(references + place, in_nats(scaled, FAST), mask=live)
            place = partial + split * FIELDS * num_rows.to(tl.int64) + rows
            if FIXED:
                tl.store(place + num_rows, total, mask=live)
                if ENTROPY:
                    tl.store(place + 2 * num_rows, weighted, mask=live)
            else:
                rest = total
                if not EXACT:
                    excess = rounding_of(scaled, reference, FAST)
                    growth = power(excess, FAST)
                    rest = growth * total - 1
                    # Rounded, where one logit has all of the mass.
                    rest = tl.where((rest < 0) & (rest > -0.5), 0.0, rest)
                    weighted = in_nats(growth * (weighted + excess * total), FAST)
                tl.store(place, reference, mask=live)
                tl.store(place + num_rows, rest, mask=live)
                if ENTROPY:
                    tl.store(place + 2 * num_rows, weighted, mask=live)
                if MEAN:
                    if not EXACT:
                        filled = tl.minimum(num_columns - start, split_columns)
                        sum_shift = in_nats(sum_shift + filled * excess, FAST)
                    tl.store(place + 3 * num_rows, sum_shift, mask=live)
                if ARGMAX:
                    tl.store(place + 4 * num_rows, argmax.to(ACCUMULATOR), mask=live)
                if COUNT:
                    tl.store(place + 5 * num_rows, above.to(ACCUMULATOR), mask=live)
