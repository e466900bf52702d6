"""One writer of a run: ranks that outlived a killed launcher must not write beside a resumed run.

The system lets go of the lock when the process dies, however it does.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from s2srm.checkpoint.files import checkpoints_of
from s2srm.errors import UserError

_NAME = ".lock"
_WAIT_S = 5.0


class RunLock:
    """Held by rank 0 from `take` to `release`."""

    def __init__(self, run: Path) -> None:
        self.path = checkpoints_of(run) / _NAME
        self._file: int | None = None

    def take(self) -> None:
        """UserError where another process holds the lock and does not end within some seconds."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        ends = time.monotonic() + _WAIT_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > ends:
                    self.release()
                    raise UserError(
                        f"output: another process is still writing {self.path.parents[1]}; wait "
                        "for it or end it (ranks can outlive a torchrun that was killed)"
                    ) from None
                time.sleep(0.1)

    def release(self) -> None:
        """Let others write."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def check_unlocked(run: Path) -> None:
    """UserError where another process is writing the run."""
    lock = RunLock(run)
    if lock.path.exists():
        lock.take()
        lock.release()
