"""The process beside a rank: it watches the rank, and ends it when the run cannot go on.

It runs without site-packages and shares nothing with the rank but a page of memory, so it sees a
rank that is stopped, dead, or stuck where no other thread of Python may run. Time is counted in
ticks of its own: what a suspended machine slept through is nobody's fault.

Rank 0's guardian is where the others report (`hub`); it gives the verdict, and each of them ends
its own rank and prints the line where nobody on its node has.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2srm import launcher
from s2srm.watchdog.hub import Hub, Link, Ruling
from s2srm.watchdog.pulse import Page, State
from s2srm.watchdog.verdict import Condition, Status

TICK_S = 0.25
_START_FACTOR, _START_S = 3.0, 60.0
"""Before the first step is done a rank may take so many times the limit, and never less than so
long: models are loaded, libraries imported, kernels compiled."""
DUMP_SIGNAL = signal.SIGRTMIN + 6 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
_DUMP_S = 1.0
_WAITING = ("/torch/distributed/", "/deepspeed/comm/")
_TOP_FRAMES = 4


@dataclass(frozen=True)
class Spec:
    """What a rank tells its guardian at the start.

    pid                of the rank: it may have died before this process could ask for its parent
    page_fd, stack_fd  open files: see pulse.Page, and where DUMP_SIGNAL writes the stacks
    listener_fd        rank 0 of several: a listening socket
    addresses, token   of rank 0's guardian
    launcher_pid       torchrun's process, 0 without
    """

    rank: int
    pid: int
    world: int
    node: str
    limit_s: float
    output: str
    page_fd: int
    stack_fd: int
    listener_fd: int
    addresses: list[tuple[str, int]]
    token: str
    launcher_pid: int


class Ward:
    """The rank in this guardian's charge."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.pid = spec, spec.pid
        self._page = Page(spec.page_fd)
        self._beats = -1
        self._idle_s = 0.0
        self._looked = self._waiting = False
        self._signal: int | None = None

    def is_alive(self) -> bool:
        """A process whose parent has died gets another one."""
        return os.getppid() == self.pid

    def has_lost_its_launcher(self) -> bool:
        """torchrun was killed: its ranks would live on, and hold what a new run needs."""
        launcher_pid = self.spec.launcher_pid
        if not launcher_pid or not Path("/proc/self/stat").exists():
            return False
        return _stat(self.pid, _PARENT) not in ("", str(launcher_pid))

    def status(self, seconds: float) -> Status:
        """`seconds` after the last look."""
        reading = self._page.read()
        condition = self._condition(reading.state)
        if reading.beats != self._beats:
            self._beats, self._idle_s, self._looked = reading.beats, 0.0, False
        elif condition in ("running", "stopped"):
            self._idle_s += seconds
        limit = self.spec.limit_s
        if not reading.settled:
            limit = max(_START_FACTOR * limit, _START_S)
        if condition == "running" and self._idle_s >= limit and not self._looked:
            self._looked, self._waiting = True, _is_waiting(self.dump())
        return Status(
            rank=self.spec.rank,
            node=self.spec.node,
            condition=condition,
            text=reading.text,
            collectives=reading.collectives,
            idle_s=self._idle_s,
            limit_s=limit,
            waiting=self._looked and self._waiting,
            signal=self._signal or 0,
        )

    def dump(self) -> str:
        """The stacks of all its Python threads, from a handler in C that needs no GIL."""
        os.ftruncate(self.spec.stack_fd, 0)
        os.lseek(self.spec.stack_fd, 0, os.SEEK_SET)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, DUMP_SIGNAL)
        size, ends = 0, time.monotonic() + _DUMP_S
        while time.monotonic() < ends:
            time.sleep(0.05)
            found = os.fstat(self.spec.stack_fd).st_size
            if found == size > 0:
                break
            size = found
        return os.pread(self.spec.stack_fd, 2**20, 0).decode(errors="replace")

    def keep_stacks(self) -> None:
        """Into the run's folder; a stopped rank goes on for as long as that takes."""
        os.kill(self.pid, signal.SIGCONT)
        path = stacks_folder(self.spec.output) / f"rank-{self.spec.rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.dump(), encoding="utf-8")

    def end(self) -> None:
        """SIGKILL: it may be in no state to do anything of its own."""
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)

    def _condition(self, state: State) -> Condition:
        if state == State.ENDED:
            return "ended"
        if state == State.FAILED:
            return "failed"
        if not self.is_alive():
            if self._signal is None:
                # While its parent has not asked for it yet.
                status = _stat(self.pid, _EXIT_STATUS)
                self._signal = int(status) & 0x7F if status else 0
            return "died"
        return "stopped" if _stat(self.pid, _STATE) in ("T", "t") else "running"


def stacks_folder(output: str) -> Path:
    """Where the stacks of the ranks of a run go."""
    return Path(output) / "stacks"


def main() -> None:
    """Read the Spec from standard input, and watch until the rank has ended."""
    line = sys.stdin.readline()
    if not line.endswith("\n"):
        return  # The rank died before it had said what to watch.
    values = json.loads(line)
    addresses = [(host, port) for host, port in values.pop("addresses")]
    spec = Spec(**values, addresses=addresses)
    ward = Ward(spec)
    post = Hub(spec) if spec.rank == 0 else Link(spec)
    awaited: list[Any] = [sys.stdin.fileno()]
    with contextlib.suppress(ProcessLookupError, AttributeError):  # Dead already; not Linux.
        awaited.append(os.pidfd_open(ward.pid))
    last = time.monotonic()
    while True:
        woken, _, _ = select.select([*awaited, *post.sockets()], [], [], TICK_S)
        # Either has said all it can.
        awaited = [source for source in awaited if source not in woken]
        now = time.monotonic()
        seconds, last = min(now - last, 2 * TICK_S), now
        status = ward.status(seconds)
        if status.condition == "running" and ward.has_lost_its_launcher():
            line = f"rank {spec.rank} is ended in: {status.text}: torchrun has gone"
            ruling: Ruling | None = Ruling(line, os.environ.get("LOCAL_RANK") == "0", False)
        else:
            ruling = post.exchange(status, seconds)
        if ruling is not None:
            carry_out(ruling, ward, status)
            return
        if post.is_over(status):
            return


def carry_out(ruling: Ruling, ward: Ward, status: Status) -> None:
    """End the rank, and say why where this guardian is to."""
    line = f"s2srm: error: {' '.join(ruling.line.split())}"
    if ruling.hang and status.condition in ("running", "stopped"):
        try:
            ward.keep_stacks()
        except OSError as error:
            line += f" (not those of rank {status.rank}: {error})"
    if status.condition in ("running", "stopped", "died"):
        launcher.report(line)
    if ruling.speak:
        _print(line)
    ward.end()
    if ruling.speak and ward.spec.launcher_pid:
        launcher.wait_for(ward.spec.launcher_pid)
        _print(line)


def _print(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # Whoever read it has gone as well.
        print(line, file=sys.stderr, flush=True)


def _is_waiting(stacks: str) -> bool:
    """Whether a thread stands in a collective: among its innermost frames is torch.distributed."""
    for thread in stacks.split("\n\n"):
        frames = [line for line in thread.splitlines() if line.startswith("  File ")]
        if any(part in frame for frame in frames[:_TOP_FRAMES] for part in _WAITING):
            return True
    return False


_STATE, _PARENT, _EXIT_STATUS = 0, 1, 49
"""Fields of /proc/PID/stat behind the name: number 3, 4 and 52 of proc_pid_stat(5)."""


def _stat(pid: int, field: int) -> str:
    """Empty where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return fields[field] if field < len(fields) else ""


if __name__ == "__main__":
    main()
