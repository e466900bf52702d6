"""Where a rank is, in a page of memory that its guardian reads: a beat costs no system call.

    beat()          something was done: a micro-batch, a token, a tensor written
    collective()    the same, on the way into one of the trainer's own collectives
    phase("...")    the same, and what comes next

Without a guardian they count nothing. Left out: beats from other threads than the main one.
"""

from __future__ import annotations

import mmap
import os
import struct
from enum import IntEnum
from typing import NamedTuple

_COUNTERS = struct.Struct("<QQBBH")
"""Beats, collectives, settled, state, length of the phase's name; the name follows."""
_SIZE = 512


class State(IntEnum):
    """What a rank says of itself."""

    RUNNING = 0
    ENDED = 1
    FAILED = 2
    """It raised an exception, whose line takes the phase's place."""


class Reading(NamedTuple):
    """What the page holds."""

    beats: int
    collectives: int
    settled: bool
    state: State
    text: str


class Page:
    """The page of one rank. fd: a file of any length that both processes have open."""

    def __init__(self, fd: int) -> None:
        os.ftruncate(fd, _SIZE)
        self._memory = mmap.mmap(fd, _SIZE)
        self._beats = self._collectives = 0
        self._settled, self._state = False, State.RUNNING
        self._text = b""

    def beat(self, collective: bool = False) -> None:
        """Count one more."""
        self._beats += 1
        self._collectives += collective
        self._write_counters()

    def say(self, text: str, state: State = State.RUNNING) -> None:
        """A phase, or the line that a rank ends with; too long a text is cut."""
        room = _SIZE - _COUNTERS.size
        self._text = text.encode()[:room]
        self._state = state
        self._memory[_COUNTERS.size : _COUNTERS.size + len(self._text)] = self._text
        self.beat()

    def settle(self) -> None:
        """The first step is done."""
        self._settled = True
        self.beat()

    def read(self) -> Reading:
        """What stands there now, the text as it was at one moment."""
        while True:
            before = bytes(self._memory[:])
            if before == self._memory[:]:
                break
        beats, collectives, settled, state, length = _COUNTERS.unpack_from(before)
        text = before[_COUNTERS.size : _COUNTERS.size + length].decode(errors="ignore")
        return Reading(beats, collectives, bool(settled), State(state), text)

    def close(self) -> None:
        """The rank is no longer watched."""
        self._memory.close()

    def _write_counters(self) -> None:
        values = (self._beats, self._collectives, self._settled, self._state, len(self._text))
        _COUNTERS.pack_into(self._memory, 0, *values)


_page: Page | None = None
_phase = ""


def attach(page: Page | None) -> None:
    """Whose beats are counted from now on; None: nobody's."""
    global _page
    _page = page


def is_watched() -> bool:
    """Whether this process has a guardian."""
    return _page is not None


def beat() -> None:
    """Something was done."""
    if _page is not None:
        _page.beat()


def collective() -> None:
    """All ranks are about to meet. They come here in the same order, as often as each other."""
    if _page is not None:
        _page.beat(collective=True)


def phase(text: str) -> None:
    """What is done from here on, as "PPO phase 3, rollout"."""
    global _phase
    _phase = text
    if _page is not None:
        _page.say(text)


def last_phase() -> str:
    """What is done now, or was when the run ended; empty before a run."""
    return _phase


def settle() -> None:
    """The first step is done: from now on nothing takes as long as the start."""
    if _page is not None:
        _page.settle()
