"""Runs a stage once as a whole, and then killed again and again until it has finished, in rounds.

Usage: kill_worker.py STAGE ROOT OUT SEED KILLS. Writes OUT/whole, OUT/killed-0, ... until there
were so many kills; prints their number and how many of them left a half-written checkpoint.

Half of the kills come at a random moment of a life, half at a random operation on files, before it
happens. The lives are forks of one process, so that importing torch is paid for once.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs_tiny import config, run

from s2srm.checkpoint import files


def live(stage: str, root: Path, out: Path, dies_at: int | None = None) -> int:
    """One life in a process of its own; returns its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if dies_at is not None:
                die_at_operation(dies_at)
            run(stage, config(stage, root, out, resume="auto"))
            code = 0
        finally:
            os._exit(code)
    return child


def die_at_operation(number: int) -> None:
    """Let SIGKILL come in the place of the number-th operation on files."""
    count = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run_or_die(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return run_or_die

    for owner, names in (
        (os, ("fsync", "replace", "truncate", "rename", "rmdir", "unlink")),
        (shutil, ("rmtree",)),
        (Path, ("mkdir", "rename", "unlink", "open")),
    ):
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))


def wait_or_kill(child: int, seconds: float) -> bool:
    """Whether the child was killed, by itself or after so long; it must not fail."""
    ends = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
            return os.WIFSIGNALED(status)
        if time.monotonic() > ends:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.002)


def main(stage: str, root: Path, out: Path, seed: int, num_kills: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    started = time.monotonic()
    assert not wait_or_kill(live(stage, root, out / "whole"), 1000.0)
    whole_life = time.monotonic() - started
    kills = half_written = rounds = 0
    while kills < num_kills:
        folder = out / f"killed-{rounds}"
        rounds += 1
        killed = True
        while killed:
            if (kills + rounds) % 2:
                child = live(stage, root, folder, draw.randrange(1, 120))
                killed = wait_or_kill(child, 1000.0)
            else:
                child = live(stage, root, folder)
                killed = wait_or_kill(child, draw.uniform(0.1, 0.8) * whole_life)
            kills += killed
            half_written += any(files.checkpoints_of(folder).glob(".*.tmp"))
    print(f"kills {kills} half-written {half_written} rounds {rounds}")


if __name__ == "__main__":
    stage, root, out, seed, kills = sys.argv[1:]
    main(stage, Path(root), Path(out), int(seed), int(kills))
