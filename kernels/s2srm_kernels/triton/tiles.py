"""Building blocks of the vocabulary kernels: one tile of logits and the monoid of row statistics.

Every kernel makes its logits with `dot_tile` and `finish_logits`, in the same tile shape and order
of summation: the logit of a row and a column has the same bits wherever it is computed. `hidden`
and `weight` are either pointers or, with TMA, host-side tensor descriptors of the tile's shape.

Left out: libdevice, which the interpreter does not know. tanh is written with exp.
"""

# A kernel is written in Triton's language, which a checker of Python does not know.
# pyright: basic, reportArgumentType=false, reportInvalidTypeForm=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOptionalOperand=false, reportCallIssue=false
import triton
import triton.language as tl

# exp(-1000) is 0, and 0 * -1000 is 0 where 0 * -inf would be NaN: a logit of -inf has no mass.
FLOOR = tl.constexpr(-1000.0)
# The interpreter takes bfloat16 for an integer, and its products round by the place in the tile: it
# multiplies in float64, and rounds each block's sum once.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# More than any column: the index of a column that was not found.
NO_COLUMN = tl.constexpr(2**30)


@triton.jit
def locate(item, num_row_blocks, num_splits, GROUP: tl.constexpr):
    """Work item -> (row block, split): GROUP row blocks share the columns that are in the cache."""
    items_in_group = GROUP * num_splits
    first_row_block = (item // items_in_group) * GROUP
    group_rows = tl.minimum(num_row_blocks - first_row_block, GROUP)
    within = item % items_in_group
    return first_row_block + within % group_rows, within // group_rows


@triton.jit
def multiply_add(left, right, products):
    """products + left @ right, in the accumulator's dtype."""
    if INTERPRETED:
        block = tl.dot(left.to(tl.float64), right.to(tl.float64), out_dtype=tl.float64)
        return products + block.to(products.dtype)
    return tl.dot(left, right, products, input_precision="ieee")


@triton.jit
def dot_tile(
    hidden,
    weight,
    first_row,
    first_column,
    rows,
    columns,
    depth,
    hidden_stride,
    weight_stride_v,
    weight_stride_d,
    ACCUMULATOR: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) products of rows of hidden and of weight.

    With TMA the tile begins at (first_row, first_column); without, rows and columns are its ids,
    each within bounds.
    """
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACCUMULATOR)
    if TMA:
        for k in range(0, depth, BLOCK_K):
            left = hidden.load([first_row, k])
            right = weight.load([first_column, k])
            products = multiply_add(left, right.T, products)
    else:
        offsets = tl.arange(0, BLOCK_K)
        left_rows = hidden + rows.to(tl.int64)[:, None] * hidden_stride + offsets[None, :]
        right_columns = (
            weight
            + columns.to(tl.int64)[None, :] * weight_stride_v
            + offsets.to(tl.int64)[:, None] * weight_stride_d
        )
        for k in range(0, depth, BLOCK_K):
            if EVEN_K:
                left = tl.load(left_rows)
                right = tl.load(right_columns)
            else:
                left = tl.load(left_rows, mask=offsets[None, :] < depth - k, other=0.0)
                right = tl.load(right_columns, mask=offsets[:, None] < depth - k, other=0.0)
            products = multiply_add(left, right, products)
            left_rows += BLOCK_K
            right_columns += BLOCK_K * weight_stride_d
    return products


@triton.jit
def exp(x, FAST: tl.constexpr):
    """e^x of x <= 64 or so.

    FAST is one instruction and a product, whose rounding costs |x| * 2^-24 of the result: far below
    what 16-bit inputs carry. Otherwise x is first brought into [-ln 2 / 2, ln 2 / 2].
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    if FAST:
        return tl.exp2(x * 1.4426950408889634)
    x = tl.maximum(x, FLOOR)
    twos = tl.floor(x * 1.4426950408889634 + 0.5)
    # ln 2 in two parts (Cephes): the product with the first is exact.
    rest = (x - twos * 0.693359375) + twos * 2.12194440e-4
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(twos)


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """1 - 2 / (e^2x + 1), and unless FAST below 0.625 the series of Cephes (tanhf, tanh).

    Near 0 the first has an absolute error of 2^-24, which a softcap of 30 makes 2e-6.
    """
    if FAST:
        return 1 - 2 / (exp(2 * x, True) + 1)
    square = x * x
    if x.dtype == tl.float64:
        top = (-9.64399179425052238628e-1 * square - 9.92877231001918586564e1) * square
        bottom = (square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3
        series = (top - 1.61468768441708447952e3) / (bottom * square + 4.84406305325125486048e3)
    else:
        series = -5.70498872745e-3 * square + 2.06390887954e-2
        series = series * square - 5.37397155531e-2
        series = series * square + 1.33314422036e-1
        series = series * square - 3.33332819422e-1
    size = tl.abs(x)
    # From 20 on tanh is 1; the bound keeps e^2|x| finite.
    large = 1 - 2 / (exp(2 * tl.minimum(size, 20.0), False) + 1)
    return tl.where(size < 0.625, x + x * square * series, tl.where(x < 0, -large, large))


@triton.jit
def divide(x, divisor, FAST: tl.constexpr):
    """x / divisor, a scalar argument; FAST multiplies by its reciprocal."""
    if FAST:
        return x * tl.full((1, 1), 1 / divisor, x.dtype)
    return x / tl.full((1, 1), divisor, x.dtype)


@triton.jit
def finish_logits(
    z,
    bias,
    columns,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    FAST: tl.constexpr,
):
    """Products -> logits: + bias, softcap * tanh(z / softcap), / temperature."""
    if HAS_BIAS:
        z += tl.load(bias + columns).to(z.dtype)[None, :]
    if CAPPED:
        z = tl.full((1, 1), softcap, z.dtype) * tanh(divide(z, softcap, FAST), FAST)
    if SCALED:
        z = divide(z, temperature, FAST)
    return z


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) -> its left and right half; in the layout of a product nothing moves."""
    pairs = tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
    return tl.split(pairs)


@triton.jit
def split_tile(z, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """The tile in 1, 2, 4 or 8 pieces, left to right."""
    if PARTS == 1:
        parts = (z,)
    elif PARTS == 2:
        parts = halves(z, ROWS, COLUMNS)
    elif PARTS == 4:
        left, right = halves(z, ROWS, COLUMNS)
        parts = halves(left, ROWS, COLUMNS // 2) + halves(right, ROWS, COLUMNS // 2)
    else:
        tl.static_assert(PARTS == 8)
        left, right = halves(z, ROWS, COLUMNS)
        a, b = halves(left, ROWS, COLUMNS // 2)
        c, d = halves(right, ROWS, COLUMNS // 2)
        first = halves(a, ROWS, COLUMNS // 4) + halves(b, ROWS, COLUMNS // 4)
        parts = first + halves(c, ROWS, COLUMNS // 4) + halves(d, ROWS, COLUMNS // 4)
    return parts


@triton.jit
def part_statistics(
    z,
    columns,
    lowest,
    reference,
    num_columns,
    HEADROOM: tl.constexpr,
    MASKED: tl.constexpr,
    CLAMPED: tl.constexpr,
    FAST: tl.constexpr,
):
    """Of each row: max, rest, sum of e (z - max), sum of z - max, argmax; reference, exponentials.

    e = e^(z - max); the argmax's own term of the rest, which is 1, is left out. columns count from
    0; MASKED: those from num_columns on are not there. CLAMPED: a logit may be -inf.

    exponentials are e^(z - reference). HEADROOM None: the reference is the maximum. Otherwise it is
    what was passed, unless the maximum lies further above it than HEADROOM.
    """
    maximum = tl.maximum(tl.max(z, axis=1), lowest)
    argmax = tl.min(tl.where(z == maximum[:, None], columns[None, :], NO_COLUMN), axis=1)
    if HEADROOM is None:
        reference = maximum
    else:
        reference = tl.where(maximum - reference <= HEADROOM, reference, maximum)
    shift = z - reference[:, None]
    if MASKED:
        sum_shift = tl.sum(tl.where(columns[None, :] < num_columns, shift, 0.0), axis=1)
    else:
        sum_shift = tl.sum(shift, axis=1)
    if CLAMPED:
        shift = tl.maximum(shift, FLOOR)
    exponentials = exp(shift, FAST)
    others = tl.where(columns[None, :] == argmax[:, None], 0.0, exponentials)
    rest = tl.sum(others, axis=1)
    weighted = tl.sum(others * shift, axis=1)
    if HEADROOM is not None:
        # From the reference to the maximum. Where the maximum lies so far below that the scale
        # would overflow, the part has no mass that a row's sum could feel.
        offset = reference - maximum
        scale = exp(tl.minimum(offset, 60.0), False)
        weighted = scale * (weighted + offset * rest)
        rest *= scale
        sum_shift += offset * tl.minimum(num_columns, columns.shape[0])
    return maximum, rest, weighted, sum_shift, argmax, reference, exponentials


@triton.jit
def combine(
    maximum,
    rest,
    weighted,
    sum_shift,
    argmax,
    count,
    other_maximum,
    other_rest,
    other_weighted,
    other_sum_shift,
    other_argmax,
    other_count,
):
    """Statistics of a row's first `count` columns and of the next `other_count` -> of both.

    Of equal maxima the first keeps the argmax.
    """
    above = other_maximum > maximum
    merged = tl.where(above, other_maximum, maximum)
    delta = maximum - merged
    other_delta = other_maximum - merged
    sum_shift = (sum_shift + count * delta) + (other_sum_shift + other_count * other_delta)
    # One of the two is 0: its scale is 1.
    delta = tl.maximum(delta, FLOOR)
    other_delta = tl.maximum(other_delta, FLOOR)
    decay = exp(delta + other_delta, False)
    scale = tl.where(above, decay, 1.0)
    other_scale = tl.where(above, 1.0, decay)
    weighted = scale * (weighted + (rest + 1) * delta)
    weighted += other_scale * (other_weighted + (other_rest + 1) * other_delta)
    # The one of the two maxima that is not the merged one joins the rest.
    rest = tl.where(above, (rest + 1) * decay + other_rest, rest + (other_rest + 1) * decay)
    argmax = tl.where(above, other_argmax, argmax)
    return merged, rest, weighted, sum_shift, argmax
