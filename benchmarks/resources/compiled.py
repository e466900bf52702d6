"""One compiled variant: what it uses of the chip, and which of its limits it breaks.

Triton compiles ahead of time for any chip, and brings NVIDIA's disassemblers with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.resources import sass

if TYPE_CHECKING:
    from benchmarks.resources.variants import Variant

# Bytes of shared memory that one block may ask for, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# From sm_90 on the driver keeps 1 KiB for itself, beyond those, and cuobjdump counts it.
RESERVED_SHARED = {80: 0, 90: 1024, 100: 1024}
# How the matrix instructions of a chip begin; a kernel without them runs at a fraction of its rate.
MATRIX_PREFIX = {80: "HMMA", 90: "HGMMA", 100: "UTC"}
# The chip whose epilogues are counted: elsewhere the pipes have other rates.
COUNTED_ARCH = 90
SCHEDULERS = 4


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled variant uses; one row of the table.

    tile: rows x columns of its products. registers are per thread, stack and shared (static and
    dynamic) are in bytes, spills counts the loads and stores of local memory, matrix the matrix
    instructions ("HGMMA.64x256x16.F32.BF16 x4", "-" where there are none), instructions all of
    them. issue and pipe, of a matrix kernel of sm_90: cycles a tile that one scheduler issues
    outside the main loop, and cycles of its busiest pipe there; None elsewhere, and where the
    compiler left no loop.
    """

    variant: str
    arch: int
    tile: str
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: str
    instructions: int
    issue: int | None
    pipe: int | None


def read_cubin(cubin: bytes, variant: Variant, dynamic_shared: int) -> Resources:
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
    instructions, _ = sass.parse(code)
    names = Counter(x.name for x in instructions)
    matrix = [
        f"{name} x{names[name]}"
        for name in sorted(names)
        if sass.MATRIX_INSTRUCTION.fullmatch(name)
    ]
    issue = pipe = None
    if variant.arch == COUNTED_ARCH and matrix:
        issue, pipe = _epilogue_cycles(code, variant.options["num_warps"])
    return Resources(
        variant=variant.name,
        arch=variant.arch,
        tile=variant.tile,
        registers=registers,
        stack=stack,
        spills=sum(x.family in ("LDL", "STL") for x in instructions),
        shared=dynamic_shared + max(static_shared - RESERVED_SHARED[variant.arch], 0),
        matrix=", ".join(matrix) or "-",
        instructions=len(instructions),
        issue=issue,
        pipe=pipe,
    )


def _epilogue_cycles(code: str, num_warps: int) -> tuple[int | None, int | None]:
    """Of the longest epilogue: cycles of issue, and of the busiest pipe; None without a main loop.

    num_warps: those that share a tile, in a kernel with specialised warps too.
    """
    found = sass.epilogues(code)
    if not found:
        return None, None
    each = [epilogue.cycles(num_warps // SCHEDULERS) for epilogue in found]
    longest = max(each, key=lambda cycles: cycles["issue"])
    busiest = max(n for name, n in longest.items() if name != "issue")
    return longest["issue"], busiest


def measure(variant: Variant) -> Resources:
    """Compiles one variant for its chip, or takes it from Triton's cache, and reads it.

    Raises what Triton raises for a kernel that does not compile.
    """
    compiler = _module("triton.compiler")
    target = _module("triton.backends.compiler").GPUTarget("cuda", variant.arch, 32)
    compiled = compiler.compile(variant.source(), target=target, options=variant.options)
    # Disassembling takes longer than finding a kernel in the cache: what was read lies beside it,
    # under the variant's name and the hash of the files that say how it was read.
    cache = _module("triton.runtime.cache").get_cache_manager(compiled.hash)
    name = f"resources-{variant.name}-{_reader()}.json"
    known = cache.get_file(name)
    if known is not None:
        return Resources(**json.loads(Path(known).read_text()))
    resources = read_cubin(compiled.asm["cubin"], variant, compiled.metadata.shared)
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


def _reader() -> str:
    texts = b"".join(Path(file).read_bytes() for file in (__file__, sass.__file__))
    return hashlib.sha256(texts).hexdigest()[:16]


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
