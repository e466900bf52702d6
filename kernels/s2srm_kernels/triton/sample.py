"""Drawing the next token: the largest perturbed logit of every row, tile by tile.

Logits have the bits of the other kernels (see tiles), and the noise those of lm_head.noise. A
program takes one block of rows and one split of the columns, as in forward; the splits' winners are
compared on the host's side.

Left out: the statistics of the same pass, though they need no target: the logprob of a draw takes
a second pass. And four ids sharing a counter's words: each makes its own, which a head read from
memory for a few rows hides, and any slice of the vocabulary may begin anywhere.
"""

# A kernel is written in Triton's language, which a checker of Python does not know.
# ruff: noqa: F821
# pyright: basic, reportArgumentType=false, reportInvalidTypeForm=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOptionalOperand=false, reportCallIssue=false, reportUndefinedVariable=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from s2srm_kernels.lm_head.noise import Noise
from s2srm_kernels.triton import configs
from s2srm_kernels.triton.problem import Problem
from s2srm_kernels.triton.tiles import NO_COLUMN, dot_tile, finish_logits, locate, split_tile


@triton.jit
def log_of_parts(fraction, exponent):
    """log((1 + fraction) * 2^exponent): Cephes' logf, in noise.py's order of operations."""
    square = fraction * fraction
    series = fraction * 7.0376836292e-2 + -1.1514610310e-1
    series = series * fraction + 1.1676998740e-1
    series = series * fraction + -1.2420140846e-1
    series = series * fraction + 1.4249322787e-1
    series = series * fraction + -1.6668057665e-1
    series = series * fraction + 2.0000714765e-1
    series = series * fraction + -2.4999993993e-1
    series = series * fraction + 3.3333331174e-1
    rest = series * fraction * square + exponent * -2.12194440e-4
    return (fraction + (rest - square * 0.5)) + exponent * 0.693359375


@triton.jit
def parts_of(x):
    """x > 0 as (1 + fraction) * 2^exponent."""
    bits = x.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    mantissa = (bits & 0x7FFFFF) + 0x3F3504F3
    return mantissa.to(tl.float32, bitcast=True) - 1.0, exponent


@triton.jit
def gumbel(seeds, positions, ids):
    """float32 noise of (rows, 1) keys and (1, columns) ids of the whole vocabulary, all int64."""
    zeros = tl.zeros_like(seeds + ids).to(tl.uint32)
    counter = ((ids // 64) * 16 + ids % 16).to(tl.uint32) + zeros
    low, high = positions.to(tl.uint32) + zeros, (positions >> 32).to(tl.uint32) + zeros
    seed_low, seed_high = seeds.to(tl.uint32) + zeros, (seeds >> 32).to(tl.uint32) + zeros
    a, b, c, d = tl.philox_impl(counter, low, high, zeros, seed_low, seed_high)
    word = ids % 64 // 16
    words = tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
    k = (words >> 1).to(tl.int32)
    from_zero = (k.to(tl.float32) + 0.5) * 4.656612873077393e-10
    from_one = ((0x7FFFFFFF - k).to(tl.float32) + 0.5) * 4.656612873077393e-10
    fraction, exponent = parts_of(from_one)
    near_zero = k < 536870912
    fraction = tl.where(near_zero, -from_zero, fraction)
    exponent = tl.where(near_zero, 0.0, exponent)
    fraction, exponent = parts_of(-log_of_parts(fraction, exponent))
    return -log_of_parts(fraction, exponent)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "num_row_blocks", "num_splits"])
def sample_kernel(
    hidden,
    weight,
    bias,
    seeds,
    positions,
    suppressed,
    best,
    chosen,
    first_id,
    num_rows,
    num_columns,
    depth,
    num_row_blocks,
    num_splits,
    split_columns,
    hidden_stride,
    weight_stride_v,
    weight_stride_d,
    softcap: "fp64",
    temperature: "fp64",
    ACCUMULATOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    NOISY: tl.constexpr,
    SUPPRESSES: tl.constexpr,
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
    """best, chosen (splits, R): the largest perturbed logit of a split, and the lowest such column.

    suppressed (V,) int8: columns that are not drawn. first_id: of column 0 in the vocabulary.
    """
    width: tl.constexpr = BLOCK_N // PARTS
    lane = tl.arange(0, width)
    for item in tl.range(tl.program_id(0), num_row_blocks * num_splits, NUM_PROGRAMS):
        row_block, split = locate(item, num_row_blocks, num_splits, GROUP)
        first_row = row_block * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        within = tl.minimum(rows, num_rows - 1)
        start = split * split_columns
        largest = tl.full((BLOCK_M,), float("-inf"), ACCUMULATOR)
        column = tl.zeros((BLOCK_M,), dtype=tl.int32) + start
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
            remaining = num_columns - first_column
            highest = tl.full((BLOCK_M, width), float("-inf"), ACCUMULATOR)
            place = tl.zeros((BLOCK_M, width), dtype=tl.int32)
            for i in tl.static_range(PARTS):
                # A branch, taken but at the end of the vocabulary: without it the compiler makes
                # the noise of all parts at once, which needs more registers than there are.
                if i * width < remaining:
                    columns = first_column + tl.minimum(i * width + lane, remaining - 1)
                    z = finish_logits(
                        parts[i],
                        bias,
                        columns,
                        softcap,
                        temperature,
                        HAS_BIAS,
                        CAPPED,
                        SCALED,
                        FAST,
                    )
                    if NOISY:
                        seed, position = tl.load(seeds + within), tl.load(positions + within)
                        ids = columns.to(tl.int64)[None, :] + first_id
                        z += gumbel(seed[:, None], position[:, None], ids).to(z.dtype)
                    drawn = i * width + lane < remaining
                    if SUPPRESSES:
                        drawn = drawn & (tl.load(suppressed + columns) == 0)
                    if SUPPRESSES or not EVEN_N:
                        z = tl.where(drawn[None, :], z, float("-inf"))
                    place = tl.where(z > highest, i * width, place)
                    highest = tl.maximum(highest, z)
            top = tl.max(highest, axis=1)
            found = tl.where(highest == top[:, None], place + lane[None, :], NO_COLUMN)
            found = tl.min(found, axis=1)
            column = tl.where(top > largest, first_column + found, column)
            largest = tl.maximum(largest, top)
        place = split * num_rows.to(tl.int64) + rows
        tl.store(best + place, largest, mask=rows < num_rows)
        tl.store(chosen + place, column, mask=rows < num_rows)


def draw(problem: Problem, noise: Noise | None, suppressed: Tensor | None) -> tuple[Tensor, Tensor]:
    """(R,) largest perturbed logits, and their columns, int64; of equal ones the lowest."""
    tile = problem.tile("sample")
    num_rows, num_columns = problem.num_rows, problem.num_columns
    split_columns = configs.split_columns(num_columns)
    num_splits, num_row_blocks = -(-num_columns // split_columns), -(-num_rows // tile.block_m)
    best = problem.empty(num_splits, num_rows)
    chosen = torch.empty(num_splits, num_rows, dtype=torch.int32, device=best.device)
    schedule = problem.schedule(tile, num_columns)
    keys = Noise(chosen, chosen) if noise is None else noise
    sample_kernel[(min(num_row_blocks * num_splits, schedule["NUM_PROGRAMS"]),)](
        seeds=keys.seeds.contiguous(),
        positions=keys.positions.contiguous(),
        suppressed=chosen if suppressed is None else suppressed.to(torch.int8),
        best=best,
        chosen=chosen,
        first_id=problem.head.shard.offset,
        num_columns=num_columns,
        num_row_blocks=num_row_blocks,
        num_splits=num_splits,
        split_columns=split_columns,
        NOISY=noise is not None,
        SUPPRESSES=suppressed is not None,
        **schedule,
        **problem.operands(tile, slice(None), slice(None)),
    )
    split = best.argmax(dim=0, keepdim=True)  # of equal maxima the first
    return best.gather(0, split).squeeze(0), chosen.gather(0, split).squeeze(0).long()
