"""Rows of the trainer's programs: one JSON object a line, for each case.

    part, case   which program, and what of it
    status       passed, failed or not run; reason: in one line, null where it passed
    seconds      of the case, loading included
    figures      what was measured, by name; units are in the names
    device, torch, transformers, deepspeed, flash-attn..., python, sources, command, date

`sources` is a hash over s2srm/ and kernels/. Figures are of the row's command and nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import environment, source_hash
from s2srm import runs

Figures = dict[str, Any]


class NotRun(Exception):
    """A case that has nothing to run here, and says why; no failure."""


class Rows:
    """Runs cases and appends a row for each. `failed`: whether one did."""

    def __init__(self, path: Path, part: str, device: torch.device) -> None:
        self.path, self.part, self.failed = path, part, False
        versions = {k: v for k, v in runs.versions().items() if v is not None}
        self.common = {**versions, **environment(device), "sources": source_hash(folders=_SOURCES)}

    def case(self, name: str, run: Callable[[], Figures]) -> None:
        """One case. Whatever it raises is its reason, with the traceback in the log."""
        start = time.perf_counter()
        status, reason, figures = "passed", None, {}
        try:
            figures = run()
        except NotRun as error:
            status, reason = "not run", str(error)
        except Exception as error:
            traceback.print_exc()
            status, self.failed = "failed", True
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        seconds = time.perf_counter() - start
        row = {"part": self.part, "case": name, "status": status, "reason": reason}
        row |= {"seconds": seconds, "figures": figures, **self.common}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        said = reason or " ".join(f"{key}={value}" for key, value in figures.items())
        print(f"{self.part} {name}: {status} after {seconds:.1f} s: {said}", flush=True)


_SOURCES = ("s2srm", "kernels")


def parser(purpose: str | None) -> argparse.ArgumentParser:
    """The arguments of every program."""
    made = argparse.ArgumentParser(description=(purpose or "").partition("\n")[0])
    made.add_argument("--name", required=True, help="the part that the rows belong to")
    made.add_argument("--device", choices=["cuda", "cpu"], required=True)
    made.add_argument("--rows", type=Path, required=True, help="file that rows are added to")
    return made
