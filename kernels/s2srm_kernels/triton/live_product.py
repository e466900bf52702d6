"""Products with a matrix of logit gradients of which whole blocks were left out.

Each program knows from a list which blocks of its sum are live, and never reads the others. For
dense gradients torch's own products are faster (see _engine).
"""

# A kernel is written in Triton's language, which a checker of Python does not know.
# pyright: basic, reportArgumentType=false, reportInvalidTypeForm=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOptionalOperand=false, reportCallIssue=false
import triton
import triton.language as tl

from s2srm_kernels.triton.tiles import multiply_add


@triton.jit
def live_product_kernel(
    left,
    right,
    result,
    live_indices,
    live_counts,
    size_m,
    size_n,
    size_k,
    indices_stride,
    left_stride_m,
    left_stride_k,
    right_stride_k,
    right_stride_n,
    result_stride,
    ACCUMULATOR: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SKIP_M: tl.constexpr,
    SKIP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """result (M, N) = or += left (M, K) @ right (K, N) over the live blocks of left.

    live_indices (ceil(M / SKIP_M), ceil(K / SKIP_K)): the live blocks' numbers in ascending order,
    then the others'; live_counts: how many are live.
    """
    steps: tl.constexpr = SKIP_K // BLOCK_K
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = tl.arange(0, BLOCK_K)
    row_block = first_row // SKIP_M
    indices = live_indices + row_block * indices_stride
    left_rows = left + tl.minimum(rows, size_m - 1).to(tl.int64)[:, None] * left_stride_m
    right_columns = right + tl.minimum(columns, size_n - 1).to(tl.int64)[None, :] * right_stride_n
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACCUMULATOR)
    for step in tl.range(0, tl.load(live_counts + row_block) * steps):
        block = tl.load(indices + step // steps)
        k = block * SKIP_K + (step % steps) * BLOCK_K + offsets
        a = tl.load(
            left_rows + k.to(tl.int64)[None, :] * left_stride_k, mask=(k < size_k)[None, :], other=0
        )
        b = tl.load(
            right_columns + k.to(tl.int64)[:, None] * right_stride_k,
            mask=(k < size_k)[:, None],
            other=0,
        )
        products = multiply_add(a, b, products)
    place = result + rows.to(tl.int64)[:, None] * result_stride + columns[None, :]
    mask = (rows < size_m)[:, None] & (columns < size_n)[None, :]
    if ACCUMULATE:
        products += tl.load(place, mask=mask, other=0)
    tl.store(place, products.to(result.dtype.element_ty), mask=mask)
