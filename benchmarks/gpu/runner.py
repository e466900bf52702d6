"""Commands with a limit each under one budget, and how each ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import ROOT

RESERVE_S = 10.0
"""Kept back for the table, and to end a process that does not stop by itself."""


@dataclass(frozen=True)
class Stage:
    """How one command ended. status: passed, failed, out of time, or not run."""

    name: str
    status: str
    seconds: float
    detail: str

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

    def run(
        self,
        name: str,
        command: Sequence[str],
        limit_s: float,
        *,
        extra_env: dict[str, str] | None = None,
        echo: bool = False,
    ) -> Stage:
        """The command from the repository's root; it and its children are ended at the limit."""
        limit_s = min(limit_s, self.time_left_s())
        if limit_s <= 0:
            return self._done(Stage(name, "not run", 0.0, "no time left"))
        print(f"[{name}] {' '.join(command)}", flush=True)
        start = time.monotonic()
        log = self.logs / f"{name}.log"
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment_of(extra_env or {}),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=limit_s)
                status = "passed" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = "out of time"
        text = log.read_text(encoding="utf-8", errors="replace").strip()
        if echo:
            print(text, flush=True)
        detail = text.rpartition("\n")[2][:160]
        return self._done(Stage(name, status, time.monotonic() - start, detail))

    def _done(self, stage: Stage) -> Stage:
        print(
            f"[{stage.name}] {stage.status} after {stage.seconds:.0f} s: {stage.detail}", flush=True
        )
        return stage


def environment_of(extra: dict[str, str]) -> dict[str, str]:
    """A bare checkout needs its two folders on the path; what is there already stays."""
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), **extra}


def from_root(path: Path) -> Path:
    """Shorter where it can be, since rows hold the command; every command starts in ROOT."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def table(stages: Sequence[Stage]) -> list[str]:
    """Lines of a table with every stage."""
    lines = ["", "| stage | status | s | |", "| --- | --- | --- | --- |"]
    return lines + [f"| {s.name} | {s.status} | {s.seconds:.0f} | {s.detail} |" for s in stages]
