"""The one file of a run: the rows of every stage, and how each stage ended.

It is named after device, kernel sources and versions, so that a second run of the same goes on
where the first stopped, and one of anything else begins anew. Every row is in it as soon as it is
measured; nothing else has to be brought home.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.runner import Stage
from benchmarks.rows import CaseRow, append_line, read_cases

_KEY = ("device", "sources", "torch", "triton", "python")
# Characters of a process's output that are kept, and of one that failed.
_LOG, _LOG_OF_FAILED = 2000, 30000
STAGE = "stage"


class Journal:
    """path: the file. run: UTC time at which this command was started."""

    def __init__(
        self,
        folder: Path,
        common: Mapping[str, Any],
        places: Iterable[Path] = (),
        copies: Path | None = None,
    ) -> None:
        """Goes on with the longest of the files of that name in `folder` and `places`.

        copies: a folder that gets the file after every stage, for a machine whose `folder` is
        emptied before the next run.
        """
        self._copies = copies
        self.path = folder / f"{key_of(common)}.jsonl"
        self.common = dict(common)
        self.run = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        folder.mkdir(parents=True, exist_ok=True)
        known = [place / self.path.name for place in (folder, *places)]
        found = [path for path in known if path.exists()]
        if found:
            longest = max(found, key=lambda path: path.stat().st_size)
            if longest != self.path:
                shutil.copyfile(longest, self.path)
        self.mend()

    def mend(self) -> None:
        """Cut off the piece of a line that a process leaves that is killed as it writes."""
        if not self.path.exists():
            return
        text = self.path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def rows(self) -> list[CaseRow]:
        return read_cases([self.path]) if self.path.exists() else []

    def passed(self, name: str) -> CaseRow | None:
        """The row of a stage that need not run again; None where its last run did not pass."""
        last = [row for row in self.rows() if row.part == STAGE and row.case == name][-1:]
        return last[0] if last and last[0].status == "passed" else None

    def record(self, stage: Stage, log: str) -> None:
        """How a stage ended, with the end of what it printed."""
        kept = log[-(_LOG_OF_FAILED if stage.bad else _LOG) :]
        figures = {} if stage.first_line_s is None else {"first_line_s": stage.first_line_s}
        fields = {"part": STAGE, "case": stage.name, "status": stage.status, "run": self.run}
        fields |= {"seconds": stage.seconds, "figures": figures, "log": kept}
        reason = None if stage.status == "passed" else stage.detail
        append_line(self.path, fields | {"reason": reason} | self.common)
        if self._copies is not None and self._copies.resolve() != self.path.parent.resolve():
            shutil.copyfile(self.path, self._copies / self.path.name)


def key_of(common: Mapping[str, Any]) -> str:
    """A file's name out of what must be the same to go on with it."""
    words = "-".join(str(common[field]) for field in _KEY).lower()
    return re.sub(r"[^a-z0-9.]+", "-", words).strip("-")
