"""Compiles every kernel that can be chosen, for GPUs that need not be there, and reads the result.

Triton compiles ahead of time for any chip, and brings NVIDIA's disassemblers with it. So a machine
without a GPU can hold each variant of `_variants.variants()` to: it compiles; no registers spilled
and no stack; shared memory within the chip's; the chip's matrix instructions in every matrix
kernel of a 16-bit dtype. What each uses is recorded in a table, so that a change shows up in the
diff:

    python -m benchmarks.resources.compile_checks --write benchmarks/results/kernel_resources.md
    python -m benchmarks.resources.compile_checks --compare benchmarks/results/kernel_resources.md

The table holds for one version of Triton: with another, only the limits are checked.

Left out: any statement about speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.resources.variants import Variant

# Bytes of shared memory that one block may ask for, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# From sm_90 on the driver keeps 1 KiB for itself, beyond those, and cuobjdump counts it.
RESERVED_SHARED = {80: 0, 90: 1024, 100: 1024}
# How the matrix instructions of a chip begin; a kernel without them runs at a fraction of its rate.
MATRIX_PREFIX = {80: "HMMA", 90: "HGMMA", 100: "UTC"}
MATRIX_INSTRUCTION = re.compile(r"(?:HMMA|HGMMA|UTC\w*MMA|DMMA)[\w.]*")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled variant uses; one row of the table.

    registers are per thread, stack and shared (static and dynamic) are in bytes, spills counts the
    loads and stores of local memory, matrix the matrix instructions ("HGMMA.64x256x16.F32.BF16 x4",
    "-" where there are none), instructions all of them.
    """

    variant: str
    arch: int
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: str
    instructions: int


def _module(name: str) -> Any:
    """A module of Triton, which has no type annotations to check against."""
    return importlib.import_module(name)


def _run(tool: str, *arguments: str) -> str:
    """Output of one of the disassemblers in Triton's wheel."""
    program = Path(_module("triton").__file__).parent / "backends" / "nvidia" / "bin" / tool
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{tool} failed with exit status {done.returncode}: {done.stderr}")
    return done.stdout


def read_cubin(cubin: bytes, variant: str, arch: int, dynamic_shared: int) -> Resources:
    """Resources of a cubin with one kernel; dynamic_shared, in bytes, is not in the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"no resource usage in what cuobjdump said: {usage}")
    registers, stack, static_shared = (int(number) for number in found.groups())
    names = Counter(INSTRUCTION.findall(code))
    families = Counter[str]()
    for name, count in names.items():
        families[name.split(".")[0]] += count
    matrix = [
        f"{name} x{names[name]}" for name in sorted(names) if MATRIX_INSTRUCTION.fullmatch(name)
    ]
    return Resources(
        variant=variant,
        arch=arch,
        registers=registers,
        stack=stack,
        spills=families["LDL"] + families["STL"],
        shared=dynamic_shared + max(static_shared - RESERVED_SHARED[arch], 0),
        matrix=", ".join(matrix) or "-",
        instructions=sum(names.values()),
    )


def measure(variant: Variant) -> Resources:
    """Compiles one variant for its chip, or takes it from Triton's cache, and reads it.

    Raises what Triton raises for a kernel that does not compile.
    """
    compiler = _module("triton.compiler")
    compiled = compiler.compile(
        compiler.ASTSource(variant.kernel, variant.signature, variant.constexprs, variant.attrs),
        target=_module("triton.backends.compiler").GPUTarget("cuda", variant.arch, 32),
        options=variant.options,
    )
    # Disassembling takes longer than finding a kernel in the cache: what was read lies beside it,
    # under the variant's name and the hash of this file, which says how it was read.
    cache = _module("triton.runtime.cache").get_cache_manager(compiled.hash)
    reader = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    name = f"resources-{variant.name}-{reader}.json"
    known = cache.get_file(name)
    if known is not None:
        return Resources(**json.loads(Path(known).read_text()))
    resources = read_cubin(
        compiled.asm["cubin"], variant.name, variant.arch, compiled.metadata.shared
    )
    cache.put(json.dumps(dataclasses.asdict(resources)), name, binary=False)
    return resources


def broken_limits(resources: Resources, needs_matrix: bool) -> list[str]:
    """What is wrong with a compiled variant, in words; needs_matrix as in `needs_matrix`."""
    where = resources.variant
    wrong: list[str] = []
    if resources.stack or resources.spills:
        wrong.append(
            f"{where}: {resources.stack} bytes of stack and {resources.spills} loads and stores of "
            f"local memory, expected none (registers: {resources.registers})"
        )
    if resources.shared > SHARED_LIMIT[resources.arch]:
        limit = SHARED_LIMIT[resources.arch]
        wrong.append(f"{where}: {resources.shared} bytes of shared memory, the chip has {limit}")
    prefix = MATRIX_PREFIX[resources.arch]
    if needs_matrix and not resources.matrix.startswith(prefix):
        wrong.append(f"{where}: matrix instructions {resources.matrix}, expected {prefix}")
    return wrong


def needs_matrix(variant: Variant) -> bool:
    """Whether the kernel must use the tensor cores, which have no exact float32 product."""
    return variant.matrix and variant.dtype in ("fp16", "bf16")


def _reason(error: BaseException) -> str:
    """The end of what the compiler says, which names the line, and what had gone wrong there."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    said = str(error)[-400:]
    return f"{type(error).__name__}: {said}" + ("" if root is error else f" ({root!r})")


def _check_one(name: str) -> tuple[Resources | None, list[str], float]:
    """Measures the variant of that name; runs in a process of its own."""
    from benchmarks.resources.variants import variants

    variant = next(v for v in variants() if v.name == name)
    start = time.perf_counter()
    try:
        resources = measure(variant)
    # Whatever Triton or ptxas raises is the finding: it becomes a line of the report.
    except Exception as error:
        return None, [f"{name}: does not compile: {_reason(error)}"], time.perf_counter() - start
    wrong = broken_limits(resources, needs_matrix(variant))
    return resources, wrong, time.perf_counter() - start


def check_all(jobs: int, only: str) -> tuple[list[Resources], list[str]]:
    """Measures every variant whose name contains `only`, in `jobs` processes.

    Returns the resources in the order of `variants()`, and what is wrong, in words.
    """
    from benchmarks.resources.variants import variants

    names = [v.name for v in variants() if only in v.name]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"variants() has these names more than once: {twice}")
    measured: list[Resources] = []
    wrong: list[str] = []
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


HEADER = (
    "variant",
    "chip",
    "registers",
    "stack (B)",
    "spills",
    "shared (B)",
    "matrix",
    "instructions",
)


def write_table(path: Path, measured: Sequence[Resources], version: str) -> None:
    """Writes the table that `read_table` reads; version is Triton's."""
    lines = [
        "# What the Triton kernels use",
        "",
        f"Triton {version}. Made by `python -m benchmarks.resources.compile_checks --write PATH`;",
        "compared with the code by tests/kernels/test_triton_compile.py.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"| {' | '.join('---' for _ in HEADER)} |",
    ]
    for row in measured:
        cells = dataclasses.asdict(row) | {"arch": f"sm_{row.arch}"}
        lines.append(f"| {' | '.join(map(str, cells.values()))} |")
    path.write_text("\n".join(lines) + "\n")


def read_table(path: Path) -> tuple[list[Resources], str]:
    """The rows of a table that `write_table` wrote, and its version of Triton."""
    text = path.read_text()
    version = re.search(r"^Triton (\S+)\. Made by", text, re.MULTILINE)
    if version is None:
        raise ValueError(f"{path} does not say which version of Triton it was made with")
    rows: list[Resources] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) != len(HEADER) or not cells[1].startswith("sm_"):
            continue
        name, arch, registers, stack, spills, shared, matrix, instructions = cells
        rows.append(
            Resources(
                variant=name,
                arch=int(arch.removeprefix("sm_")),
                registers=int(registers),
                stack=int(stack),
                spills=int(spills),
                shared=int(shared),
                matrix=matrix,
                instructions=int(instructions),
            )
        )
    return rows, version.group(1)


def differences(measured: Sequence[Resources], recorded: Sequence[Resources]) -> list[str]:
    """Where what was measured is not what was recorded, in words."""
    now = {row.variant: row for row in measured}
    then = {row.variant: row for row in recorded}
    changes = [f"{name}: not in the table" for name in now if name not in then]
    changes += [f"{name}: in the table, but no variant" for name in then if name not in now]
    for name in (name for name in now if name in then):
        new = dataclasses.asdict(now[name])
        fields = [
            f"{field} {old} -> {new[field]}"
            for field, old in dataclasses.asdict(then[name]).items()
            if old != new[field]
        ]
        if fields:
            changes.append(f"{name}: {', '.join(fields)}")
    return changes


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit status 1 where a limit is broken or the table does not agree."""
    triton = _module("triton")

    parser = argparse.ArgumentParser(
        prog="compile_checks", description="Compiles the Triton kernels."
    )
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--write", type=Path, help="write the table to this path")
    table.add_argument("--compare", type=Path, help="compare with the table at this path")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default: 2)")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    options = parser.parse_args(arguments)
    if options.only and options.write:
        parser.error("--only leaves variants out: the table needs all of them")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter's kernels cannot be compiled")

    start = time.perf_counter()
    measured, wrong = check_all(options.jobs, options.only)
    seconds = time.perf_counter() - start
    print(f"{len(measured)} variants in {seconds:.0f} s with Triton {triton.__version__}")
    if options.write:
        write_table(options.write, measured, triton.__version__)
    if options.compare:
        rows, version = read_table(options.compare)
        recorded = [row for row in rows if options.only in row.variant]
        if version != triton.__version__:
            print(f"the table is of Triton {version}: limits checked, resources not compared")
        elif changes := differences(measured, recorded):
            wrong += changes
            wrong.append(
                "if these changes are meant, record them: python -m "
                f"benchmarks.resources.compile_checks --write {options.compare}"
            )
    print("\n".join(wrong) if wrong else "all within their limits", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
