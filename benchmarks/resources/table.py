"""benchmarks/results/kernel_resources.md: written, read, and compared with what was measured."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.resources.compiled import Resources

HEADER = (
    "variant",
    "chip",
    "tile",
    "registers",
    "stack (B)",
    "spills",
    "shared (B)",
    "matrix",
    "instructions",
    "issue (cycles a tile)",
    "busiest pipe (cycles a tile)",
)
# By how much a count may grow before the comparison fails. Registers and cycles of issue are what a
# kernel's time depends on; a change of instructions that stays below this is the compiler's noise.
TOLERANCE = 0.02
_GROWS = ("registers", "shared", "instructions", "issue", "pipe")


def write_table(path: Path, measured: Sequence[Resources], version: str) -> None:
    """Writes the table that `read_table` reads; version is Triton's."""
    lines = [
        "# What the Triton kernels use",
        "",
        f"Triton {version}. Made by `python -m benchmarks.resources.compile_checks --write PATH`;",
        "compared with the code by tests/kernels/test_triton_compile.py. Cycles a tile: those of",
        "one scheduler outside the main loop (benchmarks/resources/sass.py), for sm_90.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"| {' | '.join('---' for _ in HEADER)} |",
    ]
    for row in measured:
        cells = dataclasses.asdict(row) | {"arch": f"sm_{row.arch}"}
        texts = ["-" if cell is None else str(cell) for cell in cells.values()]
        lines.append(f"| {' | '.join(texts)} |")
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
        if len(cells) == len(HEADER) and cells[1].startswith("sm_"):
            rows.append(_row(cells))
    return rows, version.group(1)


def _row(cells: Sequence[str]) -> Resources:
    name, arch, tile, registers, stack, spills, shared, matrix, instructions, issue, pipe = cells
    return Resources(
        variant=name,
        arch=int(arch.removeprefix("sm_")),
        tile=tile,
        registers=int(registers),
        stack=int(stack),
        spills=int(spills),
        shared=int(shared),
        matrix=matrix,
        instructions=int(instructions),
        issue=None if issue == "-" else int(issue),
        pipe=None if pipe == "-" else int(pipe),
    )


def differences(measured: Sequence[Resources], recorded: Sequence[Resources]) -> list[str]:
    """Where the rows that both have differ by more than the tolerance, in words."""
    then = {row.variant: row for row in recorded}
    changes: list[str] = []
    for row in (row for row in measured if row.variant in then):
        name, new = row.variant, dataclasses.asdict(row)
        fields = [
            f"{field} {old} -> {new[field]}"
            for field, old in dataclasses.asdict(then[name]).items()
            if _differs(field, old, new[field])
        ]
        if fields:
            changes.append(f"{name}: {', '.join(fields)}")
    return changes


def _differs(field: str, old: int | str | None, new: int | str | None) -> bool:
    """Whether a field grew by more than the tolerance, or is another where it has no size."""
    if field not in _GROWS or not isinstance(old, int) or not isinstance(new, int):
        return old != new
    return new > old * (1 + TOLERANCE)
