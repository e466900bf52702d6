"""Rows of the trainer's programs: `benchmarks.rows.CaseRow`, with the trainer's versions.

`sources` is a hash over s2srm/ and kernels/. Figures are of the row's command and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.cases import Cases, Figures, NotRun, parser
from benchmarks.rows import environment, source_hash
from s2srm import runs

__all__ = ["Figures", "NotRun", "Rows", "parser"]
_SOURCES = ("s2srm", "kernels")


class Rows(Cases):
    """Runs cases and appends a row for each. `failed`: whether one did."""

    def __init__(self, path: Path, part: str, device: torch.device) -> None:
        versions = {k: v for k, v in runs.versions().items() if v is not None}
        common = {**versions, **environment(device), "sources": source_hash(folders=_SOURCES)}
        super().__init__(path, part, common)
