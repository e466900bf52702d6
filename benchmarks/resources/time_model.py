"""What the vocabulary operations take on an H100 against their bare products, on paper.

    python -m benchmarks.resources.time_model

reads the counts of benchmarks/results/kernel_resources.md and prints, for five models at N = 8192
and bfloat16, the time of each operation over that of its products as a library makes them: one for
`linear_token_stats`, three for the losses, four for `linear_logprobs` with its backward.

No figure below has been measured by this project: each is an assumption until rows of a GPU stand
in benchmarks/results, and then is replaced by what they say. Left out: power, clocks that fall
under load, and the L2 cache's misses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.resources.compiled import Resources
from benchmarks.resources.table import read_table
from benchmarks.shapes import MODELS

TABLE = Path(__file__).parents[1] / "results" / "kernel_resources.md"
NUM_ROWS = 8192

# The chip: an H100 SXM.
MULTIPROCESSORS = 132  # NVIDIA, H100 Tensor Core GPU Architecture (white paper)
MATRIX_FLOPS = 4096  # per cycle and multiprocessor, dense 16-bit: 989.4e12 / (132 * 1.83e9 Hz)
# A library's product. Assumed.
LIBRARY_FLOPS = 790e12  # per second, a large bfloat16 product by cuBLAS
LIBRARY_SHARE = 0.92  # of the tensor cores' cycles that it keeps busy
NARROW_DEPTH, NARROW_SHARE, NARROW_EXCESS = 2048, 0.85, 1.05  # below this D: rate, start and end
BANDWIDTH = 3.0e12  # bytes per second that streams reach, of 3.35e12
# A fused kernel. Assumed.
MAIN_LOOP_SHARE = 0.90  # of the tensor cores' cycles that Triton's main loop keeps busy
FILL_CYCLES = 1500  # from a tile's first copy to its first product, and from the last to its end
STALL = 1.4  # time of an epilogue over the cycles that it issues in, two warps a scheduler
STALL_ALONE = 2.0  # the same with one warp a scheduler
L2_BYTES = 64  # per cycle and multiprocessor: the width of its port, not a sustained rate
# A call. Assumed.
LAUNCH_SECONDS = 2e-6  # of a kernel of some thousand entries, with the gap to the next one
SYNC_SECONDS = 0.25e-3  # the host's way to the next kernel after it has waited for the device
# Cycles a second, if a library's product is as fast and as dense as assumed: 1.59 GHz.
CLOCK = LIBRARY_FLOPS / (MULTIPROCESSORS * MATRIX_FLOPS * LIBRARY_SHARE)

PLAIN = "-plain-bf16-sm_90"


@dataclass(frozen=True)
class Operation:
    """A call of an operation, with its backward where it has one.

    logits: the kernels, by name in the table, that make all N x V logits. products: how many more
    products a library makes. bare: of how many products the whole is counted in. hidden_bytes: what
    else moves, per entry of hidden. launches: kernels of any size. limit: on the ratio, at the
    models of LIMITED.
    """

    name: str
    logits: tuple[str, ...]
    products: int
    bare: int
    hidden_bytes: int
    launches: int
    limit: float


# launches: counted with torch's profiler in calls of 144 rows that variants records, with mean
# reduction and no entropy: operators that are neither views nor allocations, and Triton's kernels.
# hidden_bytes of the losses: d_hidden's float32 product is written, scaled in place (read and
# written), rounded and scattered; hidden is scaled for d_weight.
LOSS_BYTES = 4 + 8 + 6 + 4 + 4
OPERATIONS = (
    Operation("linear_token_stats", ("statistics-argmax-count-entropy-tma",), 0, 1, 0, 64, 1.15),
    Operation("linear_cross_entropy", ("statistics-fixed-store-tma",), 2, 3, LOSS_BYTES, 163, 1.10),
    Operation(
        "linear_ppo_loss", ("statistics-fixed-entropy-store-tma",), 2, 3, LOSS_BYTES, 257, 1.10
    ),
    Operation("linear_logprobs", ("statistics-tma", "logit_gradients-tma"), 2, 4, 8, 131, 1.15),
)
# What S2SRM_HOPPER=1 puts in the place of a kernel above; PPO with its entropy keeps its own.
OPT_IN = {
    "statistics-argmax-count-entropy-tma": "hopper_statistics-argmax-count-entropy",
    "statistics-fixed-store-tma": "hopper_statistics-fixed",
    "statistics-tma": "hopper_statistics",
}
# Operation and model whose limit is passed with what is the default.
NOT_YET = frozenset(
    {
        ("linear_token_stats", "gemma-2b"),
        ("linear_token_stats", "llama-2-7b"),
        ("linear_cross_entropy", "llama-2-7b"),
        ("linear_ppo_loss", "llama-2-7b"),
    }
)
LIMITED = ("gemma-2b", "llama-2-7b", "llama-3-8b")


def bare_seconds(depth: int, columns: int, rows: int = NUM_ROWS) -> float:
    """One product of (rows, depth) and (depth, columns) as a library makes it."""
    narrow = depth < NARROW_DEPTH
    compute = 2 * rows * depth * columns / (LIBRARY_FLOPS * (NARROW_SHARE if narrow else 1.0))
    memory = 2 * (rows * columns + columns * depth + rows * depth) / BANDWIDTH
    return max(compute, memory) * (NARROW_EXCESS if narrow else 1.0)


def kernel_seconds(kernel: Resources, depth: int, columns: int, rows: int = NUM_ROWS) -> float:
    """A fused kernel that makes all logits, from its tile and its counts.

    The multiprocessors share the tiles evenly up to one tile. A tile takes its main loop, a fill
    and its epilogue: the longer of what its busiest pipe and what its issue with stalls take.
    """
    if kernel.issue is None or kernel.pipe is None:
        raise ValueError(f"the table has no cycles a tile for {kernel.variant}")
    block_m, block_n = (int(size) for size in kernel.tile.split("x"))
    tiles = -(-rows // block_m) * -(-columns // block_n)
    main = 2 * block_m * block_n * depth / (MATRIX_FLOPS * MAIN_LOOP_SHARE)
    main = max(main, 2 * (block_m + block_n) * depth / L2_BYTES)
    if kernel.variant.startswith("hopper"):
        # Two groups of warps in turn: a pair of tiles takes its two main loops, or one of them and
        # all the rest of the same group's tile, whichever is longer.
        alone = FILL_CYCLES + max(kernel.issue * STALL_ALONE, kernel.pipe)
        each = max(2 * main, main + alone) / 2
    else:
        each = main + FILL_CYCLES + max(kernel.issue * STALL, kernel.pipe)
    memory = 2 * (columns * depth + rows * depth) + 2 * rows * columns * _stores(kernel)
    return max(-(-tiles // MULTIPROCESSORS) * each / CLOCK, memory / BANDWIDTH)


def _stores(kernel: Resources) -> bool:
    """Whether it writes an N x V matrix."""
    return any(word in kernel.variant for word in ("store", "hopper_statistics-fixed", "gradients"))


def ratio(
    operation: Operation, table: Mapping[str, Resources], depth: int, columns: int, syncs: int = 0
) -> float:
    """Time of a call over that of `bare` products; syncs: how often the host waits for the device.

    ValueError where the table lacks a kernel.
    """
    seconds = operation.products * bare_seconds(depth, columns)
    for name in operation.logits:
        if name + PLAIN not in table:
            raise ValueError(f"the table has no {name + PLAIN}")
        seconds += kernel_seconds(table[name + PLAIN], depth, columns)
    seconds += operation.hidden_bytes * NUM_ROWS * depth / BANDWIDTH
    seconds += operation.launches * LAUNCH_SECONDS + syncs * SYNC_SECONDS
    return seconds / (operation.bare * bare_seconds(depth, columns))


def ratios(
    table: Mapping[str, Resources], operations: Sequence[Operation] = OPERATIONS
) -> dict[tuple[str, str], tuple[float, float]]:
    """(operation, model) -> ratio without a synchronisation and with one."""
    return {
        (operation.name, model): (
            ratio(operation, table, *size),
            ratio(operation, table, *size, syncs=1),
        )
        for operation in operations
        for model, size in MODELS.items()
    }


def opted_in() -> tuple[Operation, ...]:
    """OPERATIONS with the kernels of OPT_IN."""
    return tuple(
        replace(operation, logits=tuple(OPT_IN.get(name, name) for name in operation.logits))
        for operation in OPERATIONS
    )


def report(table: Mapping[str, Resources], operations: Sequence[Operation] = OPERATIONS) -> str:
    """The ratios as a table, with the limits that hold for the first three models."""
    found = ratios(table, operations)
    lines = [
        f"Time over that of the bare products: bfloat16, N = {NUM_ROWS}, on paper for an H100 SXM.",
        "In brackets with one wait of the host for the device (target's live rows not known).",
        "",
        f"| operation | products | limit | {' | '.join(MODELS)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in MODELS)} |",
    ]
    for operation in operations:
        cells = []
        for model in MODELS:
            without, with_sync = found[operation.name, model]
            over = model in LIMITED and without > operation.limit
            cells.append(f"{without:.2f}{' over' if over else ''} ({with_sync:.2f})")
        head = f"| {operation.name} | {operation.bare} | {operation.limit:.2f} | "
        lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit status 1 where a limit is passed."""
    parser = argparse.ArgumentParser(
        prog="time_model", description="Time of the operations, on paper."
    )
    parser.add_argument(
        "--table", type=Path, default=TABLE, help="counts of compile_checks --write"
    )
    options = parser.parse_args(arguments)
    rows, _ = read_table(options.table)
    table = {row.variant: row for row in rows}
    print(report(table))
    print("\nWith S2SRM_HOPPER=1, which has not run on a GPU:")
    print("\n".join(report(table, opted_in()).splitlines()[2:]))
    limits = {operation.name: operation.limit for operation in OPERATIONS}
    over = [
        f"{name} at {model}: {without:.3f}, limit {limits[name]}"
        for (name, model), (without, _) in ratios(table).items()
        if model in LIMITED and without > limits[name]
    ]
    print("\n" + ("\n".join(over) if over else "all within their limits"))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
