"""Which rank is to blame, from what the guardians say of theirs.

A rank that waits for others makes no progress either, so of the ranks that stand still those are
named that do not wait: they are stopped, or outside torch.distributed and not ahead of anyone.
Where all of them wait, those that entered the fewest collectives are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

FAILURE_S = 6.0
"""What ranks have to fail together; one that is alone in its trouble speaks after five."""
SIGTERM_S = 2.0
"""torchrun ends ranks by SIGTERM when one has failed: that one goes before."""

Condition = Literal["running", "stopped", "ended", "failed", "died", "lost"]


@dataclass(frozen=True)
class Status:
    """A rank as its guardian sees it.

    node         where it runs
    condition    stopped: by SIGSTOP; ended: in order; failed: with an exception; died: without a
                 word; lost: its guardian no longer answers
    text         its phase, or the line of its exception
    collectives  how many of the trainer's collectives it has entered
    idle_s       seconds since it last did something
    limit_s      what it is allowed
    waiting      in a collective, as its stack shows; known once it stands still too long
    signal       that it died of; 0 where it exited, or nobody knows
    since_s      seconds in this condition, as rank 0's guardian counts them
    """

    rank: int
    node: str
    condition: Condition
    text: str
    collectives: int = 0
    idle_s: float = 0.0
    limit_s: float = 0.0
    waiting: bool = False
    signal: int = 0
    since_s: float = 0.0

    @property
    def stands_still(self) -> bool:
        """Longer than it may."""
        return self.condition in ("running", "stopped") and self.idle_s >= self.limit_s


@dataclass(frozen=True)
class Verdict:
    """One line, the ranks whose guardians print it (one on each node that does not know yet), and
    whether there are stacks to keep."""

    line: str
    speakers: tuple[int, ...]
    hang: bool


def judge(statuses: Mapping[int, Status], world: int, stacks: str) -> Verdict | None:
    """None while nothing is wrong, or it is too early to tell.

    world: the number of ranks, of whom some may not have been heard of; stacks: their folder.
    """
    everyone = [statuses[rank] for rank in sorted(statuses)]
    alive = [s for s in everyone if s.condition in ("running", "stopped")]
    failed = [s for s in everyone if s.condition == "failed"]
    if failed:
        return _failure(failed, alive, everyone)
    died = [s for s in everyone if s.condition == "died"]
    if died:
        return _death(died, everyone, world)
    still = [s for s in alive if s.stands_still]
    culprits = _culprits(still, alive, [s for s in everyone if s.condition == "lost"])
    if not culprits:
        return None
    return Verdict(_hang_line(culprits, still, stacks, world), _speakers(everyone), hang=True)


def _failure(
    failed: Sequence[Status], alive: Sequence[Status], everyone: Sequence[Status]
) -> Verdict | None:
    """A rank that failed has said so itself. Those that go on without it are ended, and nodes whose
    ranks torchrun has ended meanwhile are told why."""
    first = max(failed, key=lambda s: s.since_s)
    informed = {s.node for s in failed}
    speakers = _speakers([s for s in everyone if s.node not in informed])
    if first.since_s < FAILURE_S if alive else not speakers:
        return None
    line = f"rank {first.rank}: {first.text}"
    return Verdict(line, speakers, hang=False)


def _death(died: Sequence[Status], everyone: Sequence[Status], world: int) -> Verdict | None:
    first = min(died, key=lambda s: (s.signal == 15, -s.since_s, s.rank))
    if first.signal == 15 and first.since_s < SIGTERM_S:
        return None
    how = {
        0: "ended without a word",
        9: "was killed (SIGKILL, which is also what the system does when memory runs out)",
        15: "was ended (SIGTERM)",
    }.get(first.signal, f"died of signal {first.signal}")
    line = f"{_name(first, world)} {how} in: {first.text}; --resume auto goes on from a checkpoint"
    return Verdict(line, _speakers(everyone), hang=False)


def _culprits(
    still: Sequence[Status], alive: Sequence[Status], lost: Sequence[Status]
) -> list[Status]:
    if still and lost:
        return list(lost)
    stopped = [s for s in still if s.condition == "stopped"]
    if stopped:
        return stopped
    fewest = min((s.collectives for s in alive), default=0)
    behind = [s for s in still if s.collectives == fewest]
    outside = [s for s in behind if not s.waiting]
    if outside:
        return outside
    # A rank that still does something will come, or stand still in its turn.
    return behind if len(still) == len(alive) else []


def _hang_line(culprits: Sequence[Status], still: Sequence[Status], stacks: str, world: int) -> str:
    named = [f"{_name(s, world)} {_manner(s)} in: {s.text}" for s in culprits]
    others = [s for s in still if s.rank not in {c.rank for c in culprits}]
    if others:
        ranks = ", ".join(str(s.rank) for s in others)
        named.append(f"rank{'s' if len(others) > 1 else ''} {ranks} waited for it")
    return f"watchdog: {'; '.join(named)}; stacks are in {stacks}; --watchdog sets the time"


def _manner(status: Status) -> str:
    seconds = f"for {max(status.idle_s, status.limit_s):.0f} s"
    if status.condition == "lost":
        return "no longer answers"
    if status.condition == "stopped":
        return f"was stopped (SIGSTOP) and did nothing {seconds}"
    return f"{'waited for other ranks' if status.waiting else 'made no progress'} {seconds}"


def _name(status: Status, world: int) -> str:
    return "the run" if world == 1 else f"rank {status.rank}"


def _speakers(statuses: Sequence[Status]) -> tuple[int, ...]:
    """The first rank of every node whose guardian can speak."""
    first: dict[str, int] = {}
    for status in statuses:
        if status.condition in ("running", "stopped", "died"):
            first.setdefault(status.node, status.rank)
    return tuple(first.values())


def aged(status: Status, before: Status | None, seconds: float) -> Status:
    """`status` with the time that it has been in its condition, `seconds` after `before`."""
    if before is None or before.condition != status.condition:
        return replace(status, since_s=0.0)
    return replace(status, since_s=before.since_s + seconds)
