"""A run with a guardian beside every rank: `watching` is put around the run's work.

Left out: what happens before the process group is there, which torchrun's rendezvous watches, and
after the run has ended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from s2srm import distributed, launcher
from s2srm.errors import UserError
from s2srm.watchdog import pulse
from s2srm.watchdog.guardian import DUMP_SIGNAL
from s2srm.watchdog.hub import listen
from s2srm.watchdog.pulse import Page, State

_VERDICT_S = 10.0
"""How long a rank that lost the connection to another waits to be told why."""
_LEAVE_S = 5.0
_ANNOUNCE_S = 60.0
_PROGRAM = "import sys; sys.path.append({root!r}); from s2srm.watchdog.guardian import main; main()"

_left_behind: list[Watch] = []
"""Those whose guardian other ranks may still report to: rank 0 does not wait for it."""


@contextlib.contextmanager
def watching(limit_s: float, output: str) -> Iterator[None]:
    """Inside, the run is ended where a rank makes no progress for limit_s seconds, or dies.

    limit_s 0: nothing is watched. output: the run's folder, for stacks. All ranks must enter.
    """
    if limit_s == 0 or pulse.is_watched():
        yield
        return
    distributed.start()
    watch = Watch(limit_s, output)
    try:
        yield
    except Exception as error:
        if distributed.world_size() > 1 and _lost_a_rank(error):
            # The guardians know which; this process is ended before the time is over.
            time.sleep(_VERDICT_S)
        watch.stop(error)
        raise
    except BaseException:
        watch.stop()
        raise
    watch.stop()


def announce(line: str) -> None:
    """Tell the ranks of other nodes of a failure that came before this run was watched.

    Nothing happens where all ranks are on one node, which torchrun ends, or the run was watched.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if os.environ.get("LOCAL_WORLD_SIZE", world) == world or pulse.last_phase():
        return
    # DistError: nobody is there to be told.
    with contextlib.suppress(UserError, dist.DistError):
        distributed.start(timeout_minutes=1)
        with watching(_ANNOUNCE_S, "."):
            raise UserError(line)


class Watch:
    """A guardian of this rank, from the construction to `stop`."""

    def __init__(self, limit_s: float, output: str) -> None:
        # Read by the guardian only; no name, so that nothing is left behind.
        self._files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115
        page, stacks = (file.fileno() for file in self._files)
        is_several = distributed.world_size() > 1
        listener = None
        if is_several and distributed.is_main():
            everywhere = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
            listener = listen(everywhere)
        addresses, token = distributed.gather_objects(_reached_at(listener))[0]
        spec: dict[str, Any] = {
            "rank": distributed.rank(),
            "pid": os.getpid(),
            "world": distributed.world_size(),
            "node": f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '0')}",
            "limit_s": limit_s,
            "output": str(Path(output).absolute()),
            "page_fd": page,
            "stack_fd": stacks,
            "listener_fd": -1 if listener is None else listener.fileno(),
            "addresses": addresses,
            "token": token,
            "launcher_pid": os.getppid() if launcher.is_launched() else 0,
        }
        self._page = Page(page)
        faulthandler.register(DUMP_SIGNAL, file=stacks, all_threads=True, chain=False)
        self._guardian = _start(spec, [page, stacks, *([listener] if listener else [])])
        self._has_peers = listener is not None
        if listener is not None:
            listener.close()
        pulse.attach(self._page)
        pulse.phase("start")

    def stop(self, failure: Exception | None = None) -> None:
        """The run has ended, or failed with this exception."""
        pulse.attach(None)
        if failure is None:
            self._page.say("", State.ENDED)
        else:
            line = " ".join(str(failure).split())
            if not isinstance(failure, UserError):
                line = f"{type(failure).__name__} in: {pulse.last_phase()}: {line}"
            self._page.say(line, State.FAILED)
        self._page.close()
        assert self._guardian.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # Somebody has killed the guardian.
            self._guardian.stdin.close()
        if self._has_peers:
            _left_behind.append(self)
            return
        try:
            self._guardian.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self._guardian.kill()
            self._guardian.wait()
        faulthandler.unregister(DUMP_SIGNAL)


def _start(spec: dict[str, Any], files: Sequence[int | socket.socket]) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    guardian = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PROGRAM.format(root=root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=[file if isinstance(file, int) else file.fileno() for file in files],
        # torchrun ends the sessions of its ranks, and a terminal interrupts its group.
        start_new_session=True,
    )
    assert guardian.stdin is not None
    guardian.stdin.write(json.dumps(spec).encode() + b"\n")
    guardian.stdin.flush()
    return guardian


def _reached_at(listener: socket.socket | None) -> tuple[list[tuple[str, int]], str]:
    """(addresses to try, token) of this rank's guardian, where it listens."""
    if listener is None:
        return [], ""
    host, port = listener.getsockname()
    hosts = ["127.0.0.1"]
    if host != "127.0.0.1":
        # From where rank 0 reaches the rendezvous, others reach rank 0. The loopback goes last:
        # on another machine something else may listen there, which the token would not convince.
        outward = [h for h in (_outward_address(), socket.gethostname()) if h[:4] != "127."]
        hosts = [*outward, "127.0.0.1"]
    return [(name, port) for name in dict.fromkeys(hosts)], secrets.token_hex()


def _outward_address() -> str:
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, int(os.environ.get("MASTER_PORT", "1"))))
        return str(probe.getsockname()[0])


def _lost_a_rank(error: Exception) -> bool:
    """Whether it is a collective's complaint about another rank."""
    return isinstance(error, dist.DistError) or any(
        part in str(error) for part in ("gloo/", "NCCL", "Connection closed by peer")
    )
