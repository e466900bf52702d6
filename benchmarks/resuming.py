"""What a comparison that was cut short need not do again, read from the rows in its file.

A call is done when every provider has a row of it from the same device, sources and versions. A
provider that ended the process or its CUDA context is left out of the call, and after two such
calls of all; one that was being checked in two processes that were ended from outside, out of that
call. A call whose timing ended two processes is given up: who did it is not known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, append_line, read_cases, read_rows

LOST = "ended the CUDA context: "
"""Begins the reason of a row whose provider's kernel did."""
_SAME = ("device", "sources", "torch", "triton", "python")
_PART = "compare"
_STRIKES = 2
Call = tuple[str, str, float, str]


def call_of(op: str, shape: str, ignored: float, dtype: str) -> Call:
    """What is measured together, but for the mode."""
    return op, shape, ignored, dtype


class Progress:
    """The state of the file at the start; `begin` adds to the file."""

    def __init__(self, path: Path, common: Mapping[str, Any]) -> None:
        self._path, self._common = path, common
        there = path.exists()
        rows = [row for row in read_rows([path]) if self._same(row)] if there else []
        begun = [row for row in read_cases([path]) if row.part == _PART] if there else []
        self._rows: dict[Call, set[tuple[str, str]]] = {}
        self._lost: dict[tuple[Call, str], str] = {}
        for row in rows:
            call = call_of(row.op, row.shape, row.ignored, row.dtype)
            self._rows.setdefault(call, set()).add((row.provider, row.mode))
            if row.reason is not None and row.reason.startswith(LOST):
                self._lost[call, row.provider] = row.reason
        # A process goes from check to check: where its last one has no end, that was the culprit.
        last = {row.run: row for row in begun}
        self._unended = Counter(row.case for row in last.values() if row.status == "begun")

    def _same(self, row: Row) -> bool:
        return all(getattr(row, field) == self._common[field] for field in _SAME)

    def done(self, call: Call, providers: Sequence[str], modes: Sequence[str]) -> bool:
        """Whether every provider has a row of every mode."""
        wanted = {(provider, mode) for provider in providers for mode in modes}
        return wanted <= self._rows.get(call, set())

    def given_up(self, call: Call) -> bool:
        """Whether timing it ended two processes."""
        return self._unended[_case(call, "")] >= _STRIKES

    def obstacle(self, call: Call, provider: str) -> str | None:
        """Why the provider is not called once more; None where it may be."""
        if (call, provider) in self._lost:
            return self._lost[call, provider]
        if len({lost for lost, name in self._lost if name == provider}) >= _STRIKES:
            return f"left out: it {LOST.removesuffix(': ')} in {_STRIKES} other calls"
        if self._unended[_case(call, provider)] >= _STRIKES:
            return f"left out: {_STRIKES} processes were ended while it was checked"
        return None

    def begin(self, call: Call, provider: str, process: str) -> None:
        """Before a provider is checked; provider "": before all of the call are timed."""
        self._write(call, provider, process, "begun")

    def end(self, call: Call, process: str) -> None:
        """After all rows of the call are written."""
        self._write(call, "", process, "passed")

    def _write(self, call: Call, provider: str, process: str, status: str) -> None:
        fields = {"part": _PART, "case": _case(call, provider), "status": status, "run": process}
        append_line(self._path, fields | dict(self._common))


def _case(call: Call, provider: str) -> str:
    return f"{' '.join(map(str, call))} {provider}"
