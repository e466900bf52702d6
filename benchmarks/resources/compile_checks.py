"""Compiles every kernel that can be launched, for GPUs that need not be there, and reads it.

A machine without a GPU can hold each variant of `variants.variants()` to: it compiles; no registers
spilled and no stack; shared memory within the chip's; the chip's matrix instructions in every
matrix kernel of a 16-bit dtype. The representatives, which the test suite compiles each time, are
recorded in a table, with what an epilogue costs; --all holds every variant to the limits:

    python -m benchmarks.resources.compile_checks --write benchmarks/results/kernel_resources.md
    python -m benchmarks.resources.compile_checks --compare benchmarks/results/kernel_resources.md
    python -m benchmarks.resources.compile_checks --all

What has been compiled lies in Triton's cache, under the hash of the sources. The table holds for
one version of Triton: with another, only the limits are checked.

Left out: any statement about speed, which is time_model's.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.resources.compiled import Resources, broken_limits, measure, needs_matrix
from benchmarks.resources.table import differences, read_table, write_table

if TYPE_CHECKING:
    from benchmarks.resources.variants import Variant

# dtype and chip of the representatives with every option.
FULL_KINDS = (("bf16", 80), ("bf16", 90), ("bf16", 100), ("fp64", 90))


def representatives(variants: Sequence[Variant]) -> list[Variant]:
    """The plain bfloat16 kernels of sm_90; with every option, one of each kernel and FULL_KINDS."""
    chosen: dict[object, Variant] = {}
    for variant in variants:
        kind = (variant.dtype, variant.arch)
        if kind == ("bf16", 90) and variant.case == "plain":
            chosen[variant.name] = variant
        elif kind in FULL_KINDS and variant.case == "full" and variant.matrix:
            chosen.setdefault((variant.kernel, kind), variant)
    return list(chosen.values())


def check_all(jobs: int, chosen: Sequence[Variant]) -> tuple[list[Resources], list[str]]:
    """Measures variants in `jobs` processes: resources in their order; what is wrong, in words."""
    measured: list[Resources] = []
    wrong: list[str] = []
    names = [variant.name for variant in chosen]
    # Processes made anew: Triton's compiler is not to be forked once it has run.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        results = pool.map(_check_one, names)
        for name, (resources, found, seconds) in zip(names, results, strict=True):
            print(f"{seconds:6.1f} s  {name}", flush=True)
            wrong += found
            if resources is not None:
                measured.append(resources)
    return measured, wrong


def _check_one(name: str) -> tuple[Resources | None, list[str], float]:
    """Measures the variant of that name; runs in a process of its own."""
    from benchmarks.resources.variants import find

    variant = find(name)
    start = time.process_time()
    try:
        resources = measure(variant)
    # Whatever Triton or ptxas raises is the finding: it becomes a line of the report.
    except Exception as error:
        return None, [f"{name}: does not compile: {_reason(error)}"], time.process_time() - start
    wrong = broken_limits(resources, needs_matrix(variant))
    return resources, wrong, time.process_time() - start


def _reason(error: BaseException) -> str:
    """The end of what the compiler says, which names the line, and what had gone wrong there."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    said = str(error)[-400:]
    return f"{type(error).__name__}: {said}" + ("" if root is error else f" ({root!r})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compile_checks", description="Compiles the Triton kernels."
    )
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--write", type=Path, help="write the table to this path")
    table.add_argument("--compare", type=Path, help="compare with the table at this path")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default: 2)")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--all", action="store_true", help="not the representatives alone")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit status 1 where a limit is broken or the table does not agree."""
    triton = importlib.import_module("triton")
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.only or options.all) and options.write:
        parser.error(
            "the table has the representatives: neither --only nor --all goes with --write"
        )
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter's kernels cannot be compiled")

    from benchmarks.resources.variants import variants

    recorded = representatives(variants())
    chosen = [v for v in (variants() if options.all else recorded) if options.only in v.name]
    measured, wrong = check_all(options.jobs, chosen)
    print(f"{len(measured)} variants with Triton {triton.__version__}, {_cpu_seconds():.0f} CPU s")
    if options.write:
        write_table(options.write, measured, triton.__version__)
    if options.compare:
        rows, version = read_table(options.compare)
        if version != triton.__version__:
            print(f"the table is of Triton {version}: limits checked, resources not compared")
        elif changes := _changes(measured, rows, recorded):
            wrong += changes
            wrong.append(
                "if these changes are meant, record them: python -m "
                f"benchmarks.resources.compile_checks --write {options.compare}"
            )
    print("\n".join(wrong) if wrong else "all within their limits", flush=True)
    return 1 if wrong else 0


def _changes(
    measured: Sequence[Resources], recorded: Sequence[Resources], expected: Sequence[Variant]
) -> list[str]:
    """Differences of what was measured, and rows that no representative has or that one lacks."""
    names = {variant.name for variant in expected}
    known = {row.variant for row in recorded}
    there = {row.variant for row in measured}
    changes = [f"{name}: in the table, but no representative" for name in sorted(known - names)]
    changes += [f"{name}: not in the table" for name in sorted(names - known)]
    return changes + differences(
        [row for row in measured if row.variant in known],
        [row for row in recorded if row.variant in there],
    )


def _cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


if __name__ == "__main__":
    sys.exit(main())
