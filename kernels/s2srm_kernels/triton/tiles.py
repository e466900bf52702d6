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
# log2(e) as float32 holds it, and in any wider type the same number.
LOG2E = tl.constexpr(1.44269502162933349609375)


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
    # Triton 3.6 takes float32 for granted unless it is told.
    return tl.dot(left, right, products, input_precision="ieee", out_dtype=products.dtype)


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
def multiply_then_add(x, y, z):
    """x * y + z, rounded once."""
    if INTERPRETED:
        return (x.to(tl.float64) * y + z).to(z.dtype)
    return tl.fma(x, y, z)


@triton.jit
def scale_reference(reference, lowest, FAST: tl.constexpr):
    """What `exponent` subtracts: the reference in nats, or FAST in powers of two; finite."""
    if FAST:
        scaled = tl.maximum(reference * LOG2E, tl.full((1,), lowest, reference.dtype))
    else:
        scaled = reference
    return scaled


@triton.jit
def exponent(z, scaled, FAST: tl.constexpr):
    """z - reference in the units of `scale_reference`, in one instruction."""
    if FAST:
        x = multiply_then_add(z, tl.full((1, 1), LOG2E, z.dtype), -scaled[:, None])
    else:
        x = z - scaled[:, None]
    return x


@triton.jit
def power(x, FAST: tl.constexpr):
    """e^(z - reference) from an `exponent`."""
    return tl.exp2(x) if FAST else exp(x, False)


@triton.jit
def rounding_of(scaled, reference, FAST: tl.constexpr):
    """How far an `exponent` is too low because the scaled reference was rounded."""
    if FAST:
        excess = scaled.to(tl.float64) - reference.to(tl.float64) * LOG2E
    else:
        excess = tl.zeros_like(reference)
    return excess.to(reference.dtype)


@triton.jit
def in_nats(x, FAST: tl.constexpr):
    """From the units of an `exponent`."""
    return x * (1 / LOG2E) if FAST else x


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
    """The tile in PARTS pieces, a power of two, left to right."""
    if PARTS == 1:
        parts = (z,)
    else:
        left, right = halves(z, ROWS, COLUMNS)
        parts = split_tile(left, ROWS, COLUMNS // 2, PARTS // 2)
        parts = parts + split_tile(right, ROWS, COLUMNS // 2, PARTS // 2)
    return parts


@triton.jit
def store_part(
    matrix, part, first_row, first_column, num_rows, num_columns, stride, TMA: tl.constexpr
):
    """Store a piece of a tile, rounded to the matrix's dtype; what lies outside is dropped."""
    if TMA:
        matrix.store([first_row, first_column], part.to(matrix.dtype))
    else:
        rows = first_row + tl.arange(0, part.shape[0])
        columns = first_column + tl.arange(0, part.shape[1])
        place = matrix + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        tl.store(place, part.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def highest_of(parts, PARTS: tl.constexpr):
    """Elementwise maximum of the pieces of a tile."""
    highest = parts[0]
    for i in tl.static_range(1, PARTS):
        highest = tl.maximum(highest, parts[i])
    return highest


@triton.jit
def column_of(parts, highest, top, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Of each row the lowest column of the tile with its largest logit; more than any without."""
    part = tl.full(highest.shape, PARTS - 1, tl.int32)
    for i in tl.static_range(1, PARTS):
        part = tl.where(parts[PARTS - 1 - i] == highest, PARTS - 1 - i, part)
    column = part * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.min(tl.where(highest == top[:, None], column, NO_COLUMN), axis=1)


@triton.jit
def without_targets(parts, holds, target, nothing, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """The tile with `nothing` (R,) at each row's column `target`; bit i of holds: in part i."""
    left = ()
    for i in tl.static_range(PARTS):
        part = parts[i]
        if (holds >> i) & 1 != 0:
            # Without it the compiler selects in every part of every tile.
            tl.debug_barrier()
            is_target = target[:, None] == (i * WIDTH + tl.arange(0, WIDTH))[None, :]
            part = tl.where(is_target, nothing[:, None], part)
        left += (part,)
    return left


@triton.jit
def slope_of(z, softcap, temperature):
    """The softcap's derivative at a finished logit."""
    scale = tl.full((1, 1), temperature, z.dtype) / tl.full((1, 1), softcap, z.dtype)
    capped = z * scale
    return 1 - capped * capped


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
