"""Row statistics on sm_90 with warps that each do one thing, in Gluon: opt-in, never the default.

`forward.statistics_kernel` leaves the tensor cores idle during a tile's epilogue. Here one warp
copies blocks into a ring in shared memory, and two groups of four warps take turns: while one makes
the statistics of its tile, the other multiplies the next. Nobody hands the turn over: the ring's
order does, for the blocks of the next tile come after those of this one.

The contract is `statistics_kernel`'s: the same items in the same order, the same order of summation
of a logit (blocks of 64, sixteen at a time), so the same bits of every logit; the sums over a row
are in another order within a tile, which is 128 columns wide instead of 256.

It has not run on a GPU: S2SRM_HOPPER=1 in the environment chooses it, until rows measured there
stand in benchmarks/results. Left out, and computed by `statistics_kernel` (see `serves`): bias,
softcap, temperature, MEAN, TILE_LSE, exponentials without FIXED or with ENTROPY, operands that fit
no descriptor, a V that is no multiple of 128. Left out altogether: clusters, which would share the
copies of two programs. A tile of 128 x 128 asks for 64 bytes a cycle of the L2 cache where one of
128 x 256 asks for 48.
"""

# A kernel is written in Gluon's language, which a checker of Python does not know.
# pyright: basic, reportArgumentType=false, reportInvalidTypeForm=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOptionalOperand=false, reportCallIssue=false, reportUndefinedVariable=false
# pyright: reportMissingTypeStubs=false, reportAssignmentType=false
# ruff: noqa: F821
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from s2srm_kernels.triton.configs import Tile
from s2srm_kernels.triton.problem import OPTIONS, Problem
from s2srm_kernels.triton.tiles import (
    FLOOR,
    LOG2E,
    NO_COLUMN,
    in_nats,
    locate,
    power,
    rounding_of,
)

# Named anew between Triton 3.6 and 3.9.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

FIELDS = gl.constexpr(6)
TILE = Tile(128, 128, 64, parts=1, num_warps=4, num_stages=4, descriptors=True)
# Registers of a thread: of the group that is a worker, and of the warp that copies. The other group
# has what is left of 65536.
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.constexpr_function
def accumulator_layout(block_n):
    """Of a tile that the four warps of a group share: one instruction is as wide as the tile."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, 16])


@gluon.jit
def item_tiles(
    item,
    num_items,
    active,
    num_columns,
    split_columns,
    num_row_blocks,
    num_splits,
    GROUP: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Work item -> its row block, its split and its number of tiles, 0 where there is no work."""
    row_block, split = locate(gl.minimum(item, num_items - 1), num_row_blocks, num_splits, GROUP)
    start = split * split_columns
    columns = gl.minimum(num_columns - start, split_columns)
    wanted = (item < num_items) & (gl.load(active + 1 + row_block) != 0)
    return row_block, split, gl.where(wanted, (columns + BLOCK_N - 1) // BLOCK_N, 0)


@gluon.jit
def tiles_before(tile, group, others):
    """How many tiles of the pair the ring has before this one; others: the other group's."""
    return tile + min(tile + group, others)


@gluon.jit
def produce(
    hidden,
    weight,
    active,
    left,
    right,
    ready,
    free,
    num_items,
    num_columns,
    num_blocks,
    num_row_blocks,
    num_splits,
    split_columns,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    NUM_PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copies the blocks of the two groups' tiles in turn into the ring."""
    block = 0
    for pair in range(gl.program_id(0), (num_items + 1) // 2, NUM_PROGRAMS):
        row_block_0, split, tiles_0 = item_tiles(
            2 * pair,
            num_items,
            active,
            num_columns,
            split_columns,
            num_row_blocks,
            num_splits,
            GROUP,
            BLOCK_N,
        )
        row_block_1, split_1, tiles_1 = item_tiles(
            2 * pair + 1,
            num_items,
            active,
            num_columns,
            split_columns,
            num_row_blocks,
            num_splits,
            GROUP,
            BLOCK_N,
        )
        for tile in range(0, gl.maximum(tiles_0, tiles_1)):
            for group in gl.static_range(2):
                row_block = row_block_0 if group == 0 else row_block_1
                first_split = split if group == 0 else split_1
                tiles = tiles_0 if group == 0 else tiles_1
                first_column = first_split * split_columns + tile * BLOCK_N
                if tile < tiles:
                    for k in range(0, num_blocks):
                        stage = block % STAGES
                        mbarrier.wait(free.index(stage), ((block // STAGES) & 1) ^ 1)
                        bar = ready.index(stage)
                        mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
                        _load(hidden, [row_block * BLOCK_M, k * BLOCK_K], bar, left.index(stage))
                        _load(weight, [first_column, k * BLOCK_K], bar, right.index(stage))
                        block += 1


@gluon.jit
def multiply(
    left,
    right,
    ready,
    free,
    block,
    num_blocks,
    LAYOUT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """(BLOCK_M, BLOCK_N) products of the blocks in the ring from `block` on."""
    products = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, LAYOUT)
    for k in range(0, num_blocks):
        stage = (block + k) % STAGES
        mbarrier.wait(ready.index(stage), ((block + k) // STAGES) & 1)
        pending = warpgroup_mma(
            left.index(stage), right.index(stage).permute((1, 0)), products, is_async=True
        )
        # One product may be under way: the one before has read its blocks.
        products = warpgroup_mma_wait(1, deps=[pending])
        before = (block + k + STAGES - 1) % STAGES
        mbarrier.arrive(free.index(before), count=1, pred=k > 0)
    products = warpgroup_mma_wait(0, deps=[products])
    mbarrier.arrive(free.index((block + num_blocks - 1) % STAGES), count=1)
    return products


@gluon.jit
def consume(
    arguments,
    GROUP_ID: gl.constexpr,
    ARGMAX: gl.constexpr,
    COUNT: gl.constexpr,
    ENTROPY: gl.constexpr,
    FIXED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP: gl.constexpr,
    NUM_PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The statistics of every second item of the program."""
    (
        exponentials,
        columns,
        target_logits,
        fixed_references,
        active,
        holds_target,
        partial,
        left,
        right,
        ready,
        free,
        staging,
        num_rows,
        num_items,
        num_columns,
        num_blocks,
        num_row_blocks,
        num_splits,
        num_tiles,
        split_columns,
        lowest,
    ) = arguments
    LAYOUT: gl.constexpr = accumulator_layout(BLOCK_N)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    lane = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    floor = gl.full((BLOCK_M,), lowest, gl.float32, ROW_LAYOUT)
    zeros = gl.zeros((BLOCK_M,), gl.float32, ROW_LAYOUT)
    block = 0
    for pair in range(gl.program_id(0), (num_items + 1) // 2, NUM_PROGRAMS):
        row_block, split, tiles = item_tiles(
            2 * pair + GROUP_ID,
            num_items,
            active,
            num_columns,
            split_columns,
            num_row_blocks,
            num_splits,
            GROUP,
            BLOCK_N,
        )
        _, _, others = item_tiles(
            2 * pair + 1 - GROUP_ID,
            num_items,
            active,
            num_columns,
            split_columns,
            num_row_blocks,
            num_splits,
            GROUP,
            BLOCK_N,
        )
        rows = row_block * BLOCK_M + gl.arange(0, BLOCK_M, layout=ROW_LAYOUT)
        live = (rows < num_rows) & (tiles > 0)
        within = gl.minimum(rows, num_rows - 1)
        start = split * split_columns
        reference = floor
        if FIXED:
            reference = gl.load(fixed_references + within)
        scaled = gl.maximum(reference * LOG2E, floor)
        total, weighted = zeros, zeros
        above = gl.zeros((BLOCK_M,), gl.int32, ROW_LAYOUT)
        argmax = above + start
        for tile in range(0, tiles):
            earlier = tiles_before(tile, GROUP_ID, others)
            z = multiply(
                left,
                right,
                ready,
                free,
                block + earlier * num_blocks,
                num_blocks,
                LAYOUT,
                BLOCK_M,
                BLOCK_N,
                STAGES,
            )
            first_column = start + tile * BLOCK_N
            if COUNT:
                threshold = gl.load(target_logits + within)[:, None]
                above += gl.sum((z > threshold).to(gl.int32), axis=1)
            if FIXED:
                if gl.load(holds_target + row_block * num_tiles + first_column // BLOCK_N) != 0:
                    # A target is left out of its row's sum: that of the others keeps its digits.
                    target = gl.load(columns + within) - first_column
                    is_target = target[:, None] == lane[None, :]
                    z = gl.where(is_target, (reference - 1000)[:, None], z)
            else:
                top = gl.max(z, axis=1)
                if ARGMAX:
                    column = gl.where(z == top[:, None], lane[None, :], NO_COLUMN)
                    column = first_column + gl.min(column, axis=1)
                    argmax = gl.where(top > reference, column, argmax)
                before = scaled
                reference = gl.maximum(reference, top)
                scaled = gl.maximum(reference * LOG2E, floor)
                delta = gl.maximum(before - scaled, FLOOR)
                decay = power(delta, True)
                weighted = decay * (weighted + total * delta)
                total *= decay
            x = gl.fma(z, LOG2E, -scaled[:, None])
            e = gl.exp2(x)
            if FIXED:
                # The copy of the tile before has left the shared memory.
                tma.store_wait(0)
                staging.index(GROUP_ID).store(e.to(exponentials.dtype))
                fence_async_shared()
                place = [row_block * BLOCK_M, first_column]
                _store(exponentials, place, staging.index(GROUP_ID))
            if ENTROPY:
                weighted += gl.sum(e * x, axis=1)
            total += gl.sum(e, axis=1)
        block += (tiles + others) * num_blocks
        place = partial + split * FIELDS * num_rows.to(gl.int64) + rows
        if FIXED:
            gl.store(place + num_rows, total, mask=live)
        else:
            excess = rounding_of(scaled, reference, True)
            growth = power(excess, True)
            rest = growth * total - 1
            # Rounded, where one logit has all of the mass.
            rest = gl.where((rest < 0) & (rest > -0.5), 0.0, rest)
            gl.store(place, reference, mask=live)
            gl.store(place + num_rows, rest, mask=live)
            if ENTROPY:
                weighted = in_nats(growth * (weighted + excess * total), True)
                gl.store(place + 2 * num_rows, weighted, mask=live)
            if ARGMAX:
                gl.store(place + 4 * num_rows, argmax.to(gl.float32), mask=live)
            if COUNT:
                gl.store(place + 5 * num_rows, above.to(gl.float32), mask=live)
    if FIXED:
        tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["num_rows", "num_columns", "num_row_blocks", "num_splits", "num_tiles"]
)
def hopper_statistics_kernel(
    hidden,
    weight,
    exponentials,
    columns,
    target_logits,
    fixed_references,
    active,
    holds_target,
    partial,
    num_rows,
    num_columns,
    depth,
    num_row_blocks,
    num_splits,
    num_tiles,
    split_columns,
    lowest: "fp64",
    ARGMAX: gl.constexpr,
    COUNT: gl.constexpr,
    ENTROPY: gl.constexpr,
    FIXED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    NUM_PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """partial (splits, 6, R) as statistics_kernel's; FIXED: exponentials (R, V) too."""
    num_items = num_row_blocks * num_splits
    if gl.load(active) == 0:
        num_items = 0
    num_blocks = (depth + BLOCK_K - 1) // BLOCK_K
    left = gl.allocate_shared_memory(hidden.dtype, [STAGES, BLOCK_M, BLOCK_K], hidden.layout)
    right = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_N, BLOCK_K], weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    staging = left
    if FIXED:
        staging = gl.allocate_shared_memory(
            exponentials.dtype, [2, BLOCK_M, BLOCK_N], exponentials.layout
        )
    arguments = (
        exponentials,
        columns,
        target_logits,
        fixed_references,
        active,
        holds_target,
        partial,
        left,
        right,
        ready,
        free,
        staging,
        num_rows,
        num_items,
        num_columns,
        num_blocks,
        num_row_blocks,
        num_splits,
        num_tiles,
        split_columns,
        lowest,
    )
    gl.warp_specialize(
        [
            (
                consume,
                (
                    arguments,
                    0,
                    ARGMAX,
                    COUNT,
                    ENTROPY,
                    FIXED,
                    BLOCK_M,
                    BLOCK_N,
                    GROUP,
                    NUM_PROGRAMS,
                    STAGES,
                ),
            ),
            (
                consume,
                (
                    arguments,
                    1,
                    ARGMAX,
                    COUNT,
                    ENTROPY,
                    FIXED,
                    BLOCK_M,
                    BLOCK_N,
                    GROUP,
                    NUM_PROGRAMS,
                    STAGES,
                ),
            ),
            (
                produce,
                (
                    hidden,
                    weight,
                    active,
                    left,
                    right,
                    ready,
                    free,
                    num_items,
                    num_columns,
                    num_blocks,
                    num_row_blocks,
                    num_splits,
                    split_columns,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    GROUP,
                    NUM_PROGRAMS,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def serves(problem: Problem, fields: dict[str, bool], fixed: bool, stored: bool) -> bool:
    """Whether the kernel makes these fields of this head; stored, fixed: as STORE and FIXED."""
    head = problem.head
    plain = head.bias is None and head.softcap is None and head.temperature == 1.0
    whole = problem.num_columns % TILE.block_n == 0
    asked = not fields["MEAN"] and stored == fixed and not (fixed and fields["ENTROPY"])
    return problem.family == "sm_90" and problem.aligned and whole and plain and asked


def launch(
    problem: Problem,
    rows: slice,
    exponentials: Tensor | None,
    fields: dict[str, bool],
    split_columns: int,
    arguments: dict[str, Any],
) -> None:
    """Fill `partial`; the arguments are statistics_kernel's, exponentials None unless FIXED."""
    hidden, weight = problem.hidden[rows], problem.weight
    num_columns = weight.shape[0]
    num_row_blocks = -(-hidden.shape[0] // TILE.block_m)
    num_splits = -(-num_columns // split_columns)
    num_pairs = -(-num_row_blocks * num_splits // 2)
    hopper_statistics_kernel[(min(num_pairs, problem.programs),)](
        hidden=_descriptor(hidden, TILE.block_m, TILE.block_k),
        weight=_descriptor(weight, TILE.block_n, TILE.block_k),
        exponentials=hidden
        if exponentials is None
        else _descriptor(exponentials, TILE.block_m, TILE.block_n),
        num_rows=hidden.shape[0],
        num_columns=num_columns,
        depth=hidden.shape[1],
        num_row_blocks=num_row_blocks,
        num_splits=num_splits,
        split_columns=split_columns,
        lowest=problem.lowest,
        ARGMAX=fields["ARGMAX"],
        COUNT=fields["COUNT"],
        ENTROPY=fields["ENTROPY"],
        FIXED=exponentials is not None,
        BLOCK_M=TILE.block_m,
        BLOCK_N=TILE.block_n,
        BLOCK_K=TILE.block_k,
        GROUP=TILE.group,
        NUM_PROGRAMS=problem.programs,
        STAGES=TILE.num_stages,
        num_warps=TILE.num_warps,
        **arguments,
        **OPTIONS,
    )


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A host-side descriptor with the layout that the tensor cores read."""
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[matrix.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    return TensorDescriptor(
        matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], layout
    )
