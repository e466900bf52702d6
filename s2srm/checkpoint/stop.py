"""SIGTERM, which schedulers send some time before they kill: the run stops between two steps.

The first signal asks for that; a second one ends the process at once, as without this. Left out: a
stop inside a step, so that a PPO phase that takes longer than the scheduler waits is lost.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from s2srm import distributed

EXIT_CODE = 128 + signal.SIGTERM


class Stopped(SystemExit):
    """The run was asked to stop, and did so with everything saved; the exit code is 143."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopRequest:
    """Notes SIGTERM while it is entered; does nothing outside the main thread or if not enabled."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._seen = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        if self.enabled and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def seen(self) -> bool:
        """Whether any rank was asked to stop. All ranks call it."""
        return self.enabled and distributed.max_over_ranks(int(self._seen)) > 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
