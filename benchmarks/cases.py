"""Cases of a program, one `CaseRow` each, written when it ends.

A file that has a case already is gone on with: what passed is not run again, and what was begun and
never ended, because it killed or hung its process, comes after everything else. Left out: limits of
time; whoever starts the program ends it.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import append_line, environment, read_cases

Figures = dict[str, Any]
Case = tuple[str, Callable[[], Figures]]
RESTART = 3
"""Exit status of a program whose CUDA context is dead: the rest needs a process of its own."""
CUT_SHORT = 4
"""Exit status of a program that left something out for lack of time and can go on with it."""
# How the message of an error begins after which the context answers every call with an error.
_DEAD = ("CUDA error", "Triton Error [CUDA]", "CUDA driver error", "CUBLAS_STATUS_EXECUTION_FAILED")


class NotRun(Exception):
    """A case that has nothing to run here, and says why; no failure."""


def is_context_lost(error: BaseException) -> bool:
    """Whether nothing more is to be expected of this process's CUDA context.

    Too little memory is no such error: the allocator of torch and Triton's launcher report it by
    these names too, and the next call may well fit.
    """
    text = str(error)
    return any(sign in text for sign in _DEAD) and "out of memory" not in text


def describe(error: BaseException) -> str:
    """One line for a row."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Cases:
    """Runs cases and appends a row for each. `failed`: whether one did.

    common: fields that every row has. run: when the command was started that this is a part of.
    again: what an earlier command measured does not count.
    """

    def __init__(
        self,
        path: Path,
        part: str,
        common: Mapping[str, Any],
        run: str | None = None,
        again: bool = False,
    ) -> None:
        self.path, self.part, self.failed = path, part, False
        self.common, self.started, self.again = dict(common), run, again

    def case(self, name: str, run: Callable[[], Figures]) -> bool:
        """One case; False where it lost the CUDA context.

        Whatever it raises is its reason, with the traceback in the log.
        """
        start = time.perf_counter()
        status, reason, figures, alive = "passed", None, {}, True
        try:
            figures = run()
        except NotRun as error:
            status, reason = "not run", str(error)
        except Exception as error:
            traceback.print_exc()
            status, self.failed = "failed", True
            reason, alive = describe(error), not is_context_lost(error)
        seconds = time.perf_counter() - start
        self._write(name, status, reason=reason, seconds=seconds, figures=figures)
        said = reason or " ".join(f"{key}={short(value)}" for key, value in figures.items())
        print(f"{self.part} {name}: {status} after {seconds:.1f} s: {said}", flush=True)
        return alive

    def run_all(self, cases: Sequence[Case]) -> int:
        """The exit status: 0, 1 where one failed, RESTART where one lost the CUDA context."""
        known: dict[str, str] = {}
        if self.path.exists():
            for row in read_cases([self.path]):
                # What an earlier command could not do is tried again.
                done = row.status in ("passed", "begun") and not self.again
                lasts = done or row.run == self.started
                if row.part == self.part and lasts:
                    known[row.case] = row.status
        left = [case for case in cases if known.get(case[0], "begun") == "begun"]
        left.sort(key=lambda case: case[0] in known)
        for name, run in left:
            self._write(name, "begun")
            if not self.case(name, run):
                return RESTART
        return int(self.failed or "failed" in known.values())

    def _write(self, name: str, status: str, **fields: Any) -> None:
        row = {"part": self.part, "case": name, "status": status, "run": self.started}
        append_line(self.path, row | fields | self.common)


def short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parser(purpose: str | None) -> argparse.ArgumentParser:
    """The arguments of every program that `make gpu` starts."""
    made = argparse.ArgumentParser(description=(purpose or "").partition("\n")[0])
    made.add_argument("--name", required=True, help="the part that the rows belong to")
    made.add_argument("--device", choices=["cuda", "cpu"], required=True)
    made.add_argument("--rows", type=Path, required=True, help="file that rows are added to")
    made.add_argument("--run", help="when the command was started that this is a part of")
    made.add_argument("--again", action="store_true", help="measure what the rows have already")
    return made


def cases_of(options: argparse.Namespace) -> Cases:
    """The cases of a program with the arguments of `parser`."""
    common = environment(torch.device(options.device))
    return Cases(options.rows, options.name, common, options.run, options.again)
