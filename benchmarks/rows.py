"""One JSON row for each measurement, with everything that is needed to doubt it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_SOURCES = ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A provider's time for one call, or the reason why there is none.

    anchor: what `anchor_ms` is the median time of, `3 products` or `copy`. ratio: median over the
    rounds of time over anchor of the same round; share: its inverse. errors: relative, with eager's
    beside them; null in a file where an output was not finite. peak_extra_mib includes result_mib,
    the outputs and gradients.
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


def environment(device: torch.device) -> dict[str, Any]:
    """The fields of a row that are the same for a whole run."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    filled = {key: value for key, value in dataclasses.asdict(row).items() if value is not None}
    filled["errors"] = {n: e if math.isfinite(e) else None for n, e in row.errors.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(filled, sort_keys=True) + "\n")


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """Rows of all files, in order. ValueError names the file and line of a bad one."""
    rows: list[Row] = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = Row(**json.loads(line))
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a row: {error}") from error
            errors = {n: math.inf if e is None else e for n, e in row.errors.items()}
            rows.append(dataclasses.replace(row, errors=errors))
    return rows


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
