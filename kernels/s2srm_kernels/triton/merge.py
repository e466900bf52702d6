"""Kernels that merge the splits of a row's statistics, one split after the other.

`merge_kernel` for statistics relative to each split's maximum, `add_kernel` for those relative to
one reference a row.
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

from s2srm_kernels.triton.tiles import (
    combine,
    exp,
    in_nats,
    power,
    rounding_of,
    scale_reference,
)

# Of a partial result: max, rest, weighted, shift, argmax, above.
FIELDS = tl.constexpr(6)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "num_splits"])
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
    ARGMAX: tl.constexpr,
    COUNT: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """(splits, 6, R) partial results -> (R, 7) statistics, one split after the other.

    partial: max, sum of the others, weighted, shift, argmax, above. What is not made is 0.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < num_rows
    maximum = tl.full((BLOCK_R,), lowest, ACCUMULATOR)
    rest = tl.full((BLOCK_R,), -1.0, ACCUMULATOR)
    zeros = tl.zeros((BLOCK_R,), dtype=ACCUMULATOR)
    weighted, sum_shift, argmax, above = zeros, zeros, zeros, zeros
    place = partial + rows
    for split in tl.range(0, num_splits):
        first_column = split * split_columns
        other_weighted, other_shift, other_argmax = zeros, zeros, zeros
        if ENTROPY:
            other_weighted = tl.load(place + 2 * num_rows, mask=live, other=0.0)
        if MEAN:
            other_shift = tl.load(place + 3 * num_rows, mask=live, other=0.0)
        if ARGMAX:
            other_argmax = tl.load(place + 4 * num_rows, mask=live, other=0.0)
        if COUNT:
            above += tl.load(place + 5 * num_rows, mask=live, other=0.0)
        maximum, rest, weighted, sum_shift, argmax = combine(
            maximum,
            rest,
            weighted,
            sum_shift,
            argmax,
            first_column,
            tl.load(place, mask=live, other=0.0),
            tl.load(place + num_rows, mask=live, other=0.0),
            other_weighted,
            other_shift,
            other_argmax,
            tl.minimum(num_columns - first_column, split_columns),
        )
        place += FIELDS * num_rows
    if not MEAN:
        sum_shift = zeros
    if not ENTROPY:
        weighted = zeros
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


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def add_kernel(
    partial,
    target_logits,
    references,
    packed,
    far,
    active,
    num_rows,
    num_splits,
    lowest: "fp64",
    limit: "fp64",
    ACCUMULATOR: tl.constexpr,
    ENTROPY: tl.constexpr,
    FAST: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Partial sums relative to fixed references -> (R, 7) statistics, field 0 the reference.

    FIRST: far (R,) says which rows have more than `limit` times the mass of their reference, or a
    sum that is not finite; active (1 + row blocks), zeros before, counts the blocks of BLOCK_R rows
    that have any, and says which.
    """
    block = tl.program_id(0)
    rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < num_rows
    total = tl.zeros((BLOCK_R,), dtype=ACCUMULATOR)
    weighted = total
    place = partial + rows
    for _ in tl.range(0, num_splits):
        total += tl.load(place + num_rows, mask=live, other=0.0)
        if ENTROPY:
            weighted += tl.load(place + 2 * num_rows, mask=live, other=0.0)
        place += FIELDS * num_rows
    reference = tl.load(references + rows, mask=live, other=0.0)
    target_logit = tl.load(target_logits + rows, mask=live, other=0.0)
    scaled = scale_reference(reference, lowest, FAST)
    excess = rounding_of(scaled, reference, FAST)
    growth = power(excess, FAST)
    own = exp(target_logit - reference, False)
    rest = growth * total + (own - 1)
    weighted = in_nats(growth * (weighted + excess * (total + own)), FAST)
    packed += rows.to(tl.int64) * 7
    zeros = tl.zeros((BLOCK_R,), dtype=ACCUMULATOR)
    tl.store(packed, reference, mask=live)
    tl.store(packed + 1, rest, mask=live)
    tl.store(packed + 2, weighted, mask=live)
    tl.store(packed + 3, zeros, mask=live)
    tl.store(packed + 4, target_logit, mask=live)
    tl.store(packed + 5, zeros, mask=live)
    tl.store(packed + 6, zeros, mask=live)
    if FIRST:
        # Not `>`: neither comparison holds of NaN.
        is_far = ((rest <= limit) == 0) & live
        tl.store(far + rows, is_far.to(tl.int8), mask=live)
        any_far = tl.max(is_far.to(tl.int32), axis=0)
        if any_far != 0:
            tl.store(active + 1 + block, 1)
            tl.atomic_add(active, 1)
