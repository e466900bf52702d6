"""How the guardians of a run talk: lines of JSON over TCP, all to rank 0's, which judges.

Whoever does not know the run's token is not listened to. Left out: encryption, and a second hub;
without rank 0's guardian the others still see their own rank.
"""

from __future__ import annotations

import json
import secrets
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from s2srm.watchdog.verdict import Status, aged, judge

REPORT_S = 1.0
"""A guardian is heard from at least this often."""
_CONNECT_S = 3.0
_ARRIVAL_S = 15.0
_OVER_S = 3.0
_GONE = ("ended", "failed", "died", "lost")


@dataclass(frozen=True)
class Ruling:
    """A verdict, for one guardian: whether it is to print the line, and to keep the stacks."""

    line: str
    speak: bool
    hang: bool


class Post(Protocol):
    """What the hub and a link to it need to know of the run: see guardian.Spec."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def limit_s(self) -> float: ...
    @property
    def output(self) -> str: ...
    @property
    def listener_fd(self) -> int: ...
    @property
    def addresses(self) -> list[tuple[str, int]]: ...
    @property
    def token(self) -> str: ...


class Channel:
    """One connection; a broken one is closed and stays so."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket: socket.socket | None = connection
        self.rank: int | None = None
        self.silent_s = 0.0
        self._buffer = b""

    def send(self, message: dict[str, Any]) -> None:
        """A line is far smaller than the system's buffer: it goes at once or not at all."""
        if self.socket is not None:
            try:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                self.close()

    def receive(self) -> list[dict[str, Any]]:
        """What has come."""
        try:
            while self.socket is not None:
                data = self.socket.recv(65536)
                if not data:
                    self.close()
                self._buffer += data
        except BlockingIOError:
            pass
        except OSError:
            self.close()
        *lines, self._buffer = self._buffer.split(b"\n")
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:  # Not one of ours.
            self.close()
            return []
        if found:
            self.silent_s = 0.0
        return found

    def close(self) -> None:
        """Nothing is sent or received any more."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None


class Hub:
    """Rank 0's guardian: it hears all of them and judges."""

    def __init__(self, spec: Post) -> None:
        self.spec = spec
        self._stacks = f"{spec.output}/stacks"
        self._listener: socket.socket | None = None
        if spec.world > 1:
            self._listener = socket.socket(fileno=spec.listener_fd)
            self._listener.setblocking(False)
        self._channels: list[Channel] = []
        self._statuses: dict[int, Status] = {}
        self._heard: dict[int, float] = {}
        self._age_s = self._over_s = self._told_s = 0.0

    def sockets(self) -> Sequence[socket.socket]:
        """What to wake up for."""
        listening = [self._listener] if self._listener is not None else []
        return listening + [c.socket for c in self._channels if c.socket is not None]

    def exchange(self, own: Status, seconds: float) -> Ruling | None:
        """Take in what has come and judge; a verdict is sent to everyone."""
        self._age_s += seconds
        self._accept()
        heard = {own.rank: own}
        for channel in self._channels:
            channel.silent_s += seconds
            heard |= self._reports(channel)
        for rank, before in self._statuses.items():
            heard.setdefault(rank, before)
        for channel in self._channels:
            if channel.rank is not None and self._is_lost(channel, heard[channel.rank]):
                heard[channel.rank] = replace(heard[channel.rank], condition="lost")
        self._statuses = {
            rank: aged(status, self._statuses.get(rank), seconds) for rank, status in heard.items()
        }
        everyone_gone = all(s.condition in _GONE for s in self._statuses.values())
        self._over_s = self._over_s + seconds if everyone_gone else 0.0
        self._told_s += seconds
        if self._told_s >= REPORT_S:
            self._told_s = 0.0
            self._tell({})
        verdict = judge(self._statuses, self.spec.world, self._stacks)
        if verdict is None:
            return None
        for channel in self._channels:
            channel.send(
                {
                    "line": verdict.line,
                    "speak": channel.rank in verdict.speakers,
                    "hang": verdict.hang,
                }
            )
        return Ruling(verdict.line, own.rank in verdict.speakers, verdict.hang)

    def is_over(self, own: Status) -> bool:
        """Every rank has gone, and had the time to say what of."""
        if own.condition not in _GONE:
            return False
        all_came = len(self._statuses) == self.spec.world or self._age_s > _ARRIVAL_S
        all_ended = all(s.condition == "ended" for s in self._statuses.values())
        alone = self.spec.world == 1 and own.condition != "died"
        over = alone or (all_came and (all_ended or self._over_s > _OVER_S))
        if over:
            self._tell({"over": True})
        return over

    def _tell(self, message: dict[str, Any]) -> None:
        for channel in self._channels:
            channel.send(message)

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            self._channels.append(Channel(connection))

    def _reports(self, channel: Channel) -> dict[int, Status]:
        found: dict[int, Status] = {}
        for message in channel.receive():
            if not secrets.compare_digest(str(message.pop("token", "")), self.spec.token):
                channel.close()
                break
            status = Status(**message)
            channel.rank = status.rank
            found[status.rank] = status
        return found

    def _is_lost(self, channel: Channel, status: Status) -> bool:
        silent = channel.silent_s > max(status.limit_s, 5 * REPORT_S)
        return status.condition not in _GONE and (channel.socket is None or silent)


class Link:
    """Another rank's guardian: it reports, and does what it is told."""

    def __init__(self, spec: Post) -> None:
        self.spec = spec
        self._channel = _connect(spec.addresses)
        self._is_over = False
        self._since_s = REPORT_S
        self._sent: Status | None = None

    def sockets(self) -> Sequence[socket.socket]:
        """What to wake up for."""
        channel = self._channel
        return [] if channel is None or channel.socket is None else [channel.socket]

    def exchange(self, own: Status, seconds: float) -> Ruling | None:
        """Report; the hub's verdict, or where there is no hub any more one of its own."""
        channel = self._channel
        if channel is not None:
            channel.silent_s += seconds
            for message in channel.receive():
                self._is_over |= bool(message.get("over"))
                if "line" in message:
                    return Ruling(**message)
            if self._is_over:
                return None
            self._since_s += seconds
            changed = self._sent is None or self._sent.condition != own.condition
            if changed or own.stands_still or self._since_s >= REPORT_S:
                self._since_s, self._sent = 0.0, own
                channel.send({"token": self.spec.token, **asdict(own)})
            if channel.socket is not None and channel.silent_s < max(own.limit_s, 5 * REPORT_S):
                return None
        known = {own.rank: own} | self._without_hub()
        verdict = judge(known, self.spec.world, f"{self.spec.output}/stacks")
        return None if verdict is None else Ruling(verdict.line, True, verdict.hang)

    def is_over(self, own: Status) -> bool:
        """The rank has gone, and the hub knows or is not there to be told."""
        if own.condition in ("ended", "failed"):
            return True
        return own.condition in _GONE and self._is_over

    def _without_hub(self) -> dict[int, Status]:
        """Rank 0 has gone with its guardian; one that never was there is not to blame."""
        if self._channel is None:
            return {}
        return {0: Status(0, "", "lost", "")}


def listen(everywhere: bool) -> socket.socket:
    """A listening socket of rank 0; on the loopback where all ranks are on one machine."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("" if everywhere else "127.0.0.1", 0))
    listener.listen(4096)
    return listener


def _connect(addresses: Sequence[tuple[str, int]]) -> Channel | None:
    """The first address that answers."""
    problems: list[str] = []
    for host, port in addresses:
        try:
            return Channel(socket.create_connection((host, port), _CONNECT_S))
        except OSError as error:
            problems.append(f"{host}:{port}: {error}")
    print(
        f"watchdog: rank 0 cannot be reached ({'; '.join(problems)}): a rank that stops on another "
        "node is not noticed on this one",
        file=sys.stderr,
        flush=True,
    )
    return None
