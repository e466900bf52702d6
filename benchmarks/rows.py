"""One JSON row for each measurement, with everything that is needed to doubt it.

`Row` is one call of the comparison, `CaseRow` one case of any other program; they may share a file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_SOURCES = ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
_Made = TypeVar("_Made", "Row", "CaseRow")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A provider's time for one call, or the reason why there is none.

    The call:
        op, mode       operation; `forward` or `forward+backward`
        shape          name of the shape
        num_rows       N, or the tokens of all packed sequences
        num_live       rows whose target is not ignored
        hidden_size    D; null for gae and token_rewards, like vocab_size
        vocab_size     V
        num_sequences  of gae and token_rewards
        ignored        fraction of prompt rows that was asked for
        dtype, inputs  of hidden and weight; `normal` or the real model's name
    Who was called:
        provider, version   as in the table of benchmarks/README.md
        workspace_bytes     bound that the call was given; null: the operation's own
        outputs             what is compared and differentiated
    Correctness:
        passed         whether every error keeps the rule; null where nothing was compared
        errors         relative errors by output and, as d_hidden, by gradient; null where infinite
        eager_errors   those of eager PyTorch in the same dtype
        reason         why there is no time; null where there is one
    Time, in milliseconds over `rounds`, and memory:
        p20_ms, p50_ms, p80_ms
        kernel_ms      of the kernels alone, without launches (sequence operations on a GPU)
        anchor         what it is compared with: `1 product`, `3 products`, `4 products`, `copy`
        anchor_ms      median time of the anchor in the same rounds
        ratio, share   median over the rounds of time over anchor; its inverse
        tflops         the anchor's operations over p50_ms, in 1e12 a second
        gb_per_s       the copy's bytes over p50_ms, in 1e9 a second
        peak_extra_mib most memory above what was in use before, outputs and gradients included
        result_mib     outputs and gradients alone
    Where it was measured: the fields of `environment`.
    """

    op: str
    provider: str
    version: str
    shape: str
    num_rows: int
    dtype: str
    ignored: float
    mode: str
    inputs: str
    device: str
    torch: str
    triton: str
    python: str
    num_threads: int
    sources: str
    command: str
    date: str
    outputs: list[str] = dataclasses.field(default_factory=list)
    num_live: int | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    num_sequences: int | None = None
    workspace_bytes: int | None = None
    reason: str | None = None
    passed: bool | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    eager_errors: dict[str, float] = dataclasses.field(default_factory=dict)
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    kernel_ms: float | None = None
    anchor: str | None = None
    anchor_ms: float | None = None
    ratio: float | None = None
    share: float | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    peak_extra_mib: float | None = None
    result_mib: float | None = None


@dataclass(frozen=True, kw_only=True)
class CaseRow:
    """How one case of a program of `make gpu` ended; `part` tells such a line from a `Row`.

        part, case     program, and what of it; part `stage`: a whole process, case its name
        status         begun, passed, failed, out of time, or not run
        reason         in one line, null where it passed
        seconds        of the case
        figures        what was measured, by name; units are in the names
        log            the end of what a process printed; part `stage` only
        run            UTC time at which the command was started that made the row
        versions       of torch, triton, python, and the packages that the program names
        device, num_threads, sources, command, date   as in `environment`

    In the file the versions stand beside the other fields.
    """

    part: str
    case: str
    status: str
    device: str
    sources: str
    command: str
    date: str
    reason: str | None = None
    seconds: float = 0.0
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    log: str | None = None
    run: str | None = None
    num_threads: int | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


def environment(device: torch.device) -> dict[str, Any]:
    """The fields of a row that are the same for a whole run.

    device       the GPU's name, or CPU and the processor's
    torch, triton, python   their versions; `none` without Triton
    num_threads  of torch on the CPU
    sources      hash over kernels/ and csrc/: rows with another are of other kernels
    command      that was run; date: of its start, UTC
    """
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "num_threads": torch.get_num_threads(),
        "sources": source_hash(),
        "command": _command(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = re.sub(r"\((R|TM)\)", "", found[1]) if found else platform.machine()
    return f"CPU {' '.join(name.split())}"


@cache
def source_hash(root: Path = ROOT, folders: tuple[str, ...] = ("kernels", "csrc")) -> str:
    """Twelve hex digits over the names and contents of sources, by default the kernels'."""
    digest = hashlib.sha256()
    files = {
        path
        for folder in folders
        for pattern in _SOURCES
        for path in (root / folder).rglob(pattern)
    }
    for path in sorted(files):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def results_file(device: str, date: str, folder: Path = RESULTS) -> Path:
    """results/<device>-<date>.jsonl"""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / f"{slug}-{date}.jsonl"


def append_row(path: Path, row: Row) -> None:
    """Written at once: a run that is cut off keeps what it has measured."""
    filled = {key: value for key, value in dataclasses.asdict(row).items() if value is not None}
    filled["errors"] = {n: e if math.isfinite(e) else None for n, e in row.errors.items()}
    append_line(path, filled)


def append_line(path: Path, fields: Mapping[str, Any]) -> None:
    """One JSON object; processes may write to one file, since a line is one write at its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(fields, sort_keys=True) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """`Row`s of all files, in order. ValueError names the file and line of a bad one."""

    def make(fields: dict[str, Any]) -> Row:
        row = Row(**fields)
        errors = {n: math.inf if e is None else e for n, e in row.errors.items()}
        return dataclasses.replace(row, errors=errors)

    return [row for path in paths for row in _read(path, make, cases=False)]


def read_cases(paths: Iterable[Path]) -> list[CaseRow]:
    """`CaseRow`s of all files, in order. ValueError names the file and line of a bad one."""
    known = {field.name for field in dataclasses.fields(CaseRow)}

    def make(fields: dict[str, Any]) -> CaseRow:
        versions = {key: fields.pop(key) for key in sorted(fields.keys() - known)}
        return CaseRow(**fields, versions=versions)

    return [row for path in paths for row in _read(path, make, cases=True)]


def _read(path: Path, make: Callable[[dict[str, Any]], _Made], cases: bool) -> Iterator[_Made]:
    """What `make` makes of the lines with a field `part`, or of those without."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
            if ("part" in fields) == cases:
                yield make(fields)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a row: {error}") from error


def _triton_version() -> str:
    # Not imported: on a CPU machine nothing here needs it.
    import importlib.metadata

    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _command() -> str:
    name = getattr(sys.modules["__main__"], "__spec__", None)
    start = f"python -m {name.name}" if name is not None else Path(sys.argv[0]).name
    return " ".join([start, *sys.argv[1:]])
