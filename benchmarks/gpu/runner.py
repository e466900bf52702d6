"""Commands with a limit each under one budget, and how each ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import CUT_SHORT
from benchmarks.rows import ROOT

RESERVE_S = 10.0
"""Kept back for the table, and to end a process that does not stop by itself."""


@dataclass(frozen=True)
class Stage:
    """How one command ended. status: passed, failed, out of time, cut short, or not run.

    cut short: it left something out by itself, to be gone on with.
    code: its exit status, negative for a signal; None where it did not end by itself.
    first_line_s: when it printed its first line, None where it printed none.
    """

    name: str
    status: str
    seconds: float
    detail: str
    code: int | None = None
    first_line_s: float | None = None

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "out of time")


class Runner:
    """Commands with a limit each, and one budget for all. Output goes to <name>.log in `logs`."""

    def __init__(self, logs: Path, budget_s: float, dry_run: bool) -> None:
        self.logs = logs
        self.deadline = time.monotonic() + budget_s
        self.dry_run = dry_run
        logs.mkdir(parents=True, exist_ok=True)

    def time_left_s(self) -> float:
        return self.deadline - time.monotonic()

    def log(self, name: str) -> str:
        """What the command of that name printed."""
        return (self.logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def run(
        self,
        name: str,
        command: Sequence[str],
        limit_s: float,
        *,
        extra_env: dict[str, str] | None = None,
        echo: bool = False,
    ) -> Stage:
        """The command from the repository's root; it and its children are ended at the limit.

        echo: its lines are shown as they come, behind its name.
        """
        limit_s = min(limit_s, self.time_left_s())
        if limit_s <= 0:
            return self._done(Stage(name, "not run", 0.0, "no time left"))
        print(f"[{name}] {' '.join(command)}", flush=True)
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment_of(extra_env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        output = _Output(process, self.logs / f"{name}.log", f"[{name}] " if echo else None)
        code = None
        try:
            code = process.wait(timeout=limit_s)
            status = {0: "passed", CUT_SHORT: "cut short"}.get(code, "failed")
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            _end_group(process)
        output.finish()
        detail = self.log(name).strip().rpartition("\n")[2][:160]
        if code is not None and code < 0:
            detail = f"ended by {signal.Signals(-code).name}: {detail}"
        first = None if output.first is None else output.first - start
        return self._done(Stage(name, status, time.monotonic() - start, detail, code, first))

    def _done(self, stage: Stage) -> Stage:
        print(
            f"[{stage.name}] {stage.status} after {stage.seconds:.0f} s: {stage.detail}", flush=True
        )
        return stage


class _Output:
    """A thread that writes a process's lines to its log, and shows them. first: when one came."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, prefix: str | None) -> None:
        assert process.stdout is not None
        self._pipe, self._log, self._prefix = process.stdout, log, prefix
        self.first: float | None = None
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        with self._log.open("wb", buffering=0) as file:
            for line in self._pipe:
                if self.first is None:
                    self.first = time.monotonic()
                file.write(line)
                if self._prefix is not None:
                    print(self._prefix + line.decode(errors="replace").rstrip("\n"), flush=True)

    def finish(self) -> None:
        """Wait for what is in the pipe still; not for a grandchild that left the session."""
        self._thread.join(timeout=5)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children, also those that it left behind."""
    with contextlib.suppress(ProcessLookupError):  # all of them ended by themselves
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment_of(extra: dict[str, str]) -> dict[str, str]:
    """A bare checkout needs its two folders on the path; what is there already stays."""
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(p for p in paths if p)
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **extra}


def from_root(path: Path) -> Path:
    """Shorter where it can be, since rows hold the command; every command starts in ROOT."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def table(stages: Sequence[Stage]) -> list[str]:
    """Lines of a table with every stage."""
    lines = ["", "| stage | status | s | |", "| --- | --- | --- | --- |"]
    return lines + [f"| {s.name} | {s.status} | {s.seconds:.0f} | {s.detail} |" for s in stages]
