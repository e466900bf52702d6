"""Which rank is blamed, from what the guardians report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from s2srm.watchdog.verdict import Status, Verdict, aged, judge


def status(rank: int, **changes: Any) -> Status:
    values: dict[str, Any] = {"node": "a/0", "condition": "running", "text": f"phase {rank}"}
    return Status(rank, **{**values, "collectives": 5, "limit_s": 10.0, **changes})


def judged(*statuses: Status) -> Verdict | None:
    return judge({s.rank: s for s in statuses}, len(statuses), "RUN/stacks")


def hanging(rank: int, **changes: Any) -> Status:
    return status(rank, idle_s=10.0, **changes)


def test_nobody_is_blamed_while_all_do_something() -> None:
    assert judged(status(0, idle_s=9.9), status(1)) is None


def test_one_that_waits_while_another_works_is_not_blamed() -> None:
    assert judged(hanging(0, waiting=True), status(1)) is None
    # An asynchronous collective does not show in the stack; being ahead of another rank does.
    assert judged(hanging(0, collectives=6), status(1)) is None


def test_one_that_does_not_wait_is_blamed_at_once_and_the_waiting_are_not() -> None:
    found = judged(hanging(0), status(1))
    assert found is not None and found.hang
    assert found.line.startswith("watchdog: rank 0 made no progress for 10 s in: phase 0; stacks")
    found = judged(hanging(0, waiting=True), hanging(1), hanging(2, waiting=True))
    assert found is not None
    assert "rank 1 made no progress for 10 s in: phase 1; ranks 0, 2 waited for it" in found.line


def test_the_one_behind_is_blamed_where_all_wait() -> None:
    found = judged(hanging(0, waiting=True), hanging(1, waiting=True, collectives=4))
    assert found is not None and "rank 1 waited for other ranks for 10 s in" in found.line
    assert "rank 0 waited for it" in found.line
    found = judged(hanging(0, waiting=True), hanging(1, waiting=True))
    assert found is not None
    assert "rank 0 waited for other ranks" in found.line
    assert "rank 1 waited for other ranks" in found.line


def test_a_stopped_rank_and_one_whose_node_is_gone() -> None:
    found = judged(hanging(0), hanging(1, condition="stopped"))
    assert found is not None and "rank 1 was stopped (SIGSTOP) and did nothing for" in found.line
    assert judged(status(0), status(1, condition="lost")) is None
    found = judged(hanging(0, waiting=True), status(1, condition="lost", node="b/1"))
    assert found is not None and "rank 1 no longer answers in: phase 1" in found.line
    assert found.speakers == (0,)


@pytest.mark.parametrize(
    ("signal", "how"),
    [(0, "ended without a word"), (9, "was killed (SIGKILL"), (11, "died of signal 11")],
)
def test_a_death_is_named_at_once(signal: int, how: str) -> None:
    found = judged(status(0), status(1, condition="died", signal=signal))
    assert found is not None and f"rank 1 {how}" in found.line and "in: phase 1" in found.line
    assert found.speakers == (0,) and not found.hang


def test_the_first_death_is_the_cause_and_sigterm_the_last_to_be_blamed() -> None:
    by_launcher = status(0, condition="died", signal=15)
    assert judged(by_launcher, status(1)) is None, "torchrun ends ranks where another has failed"
    found = judged(by_launcher, status(1, condition="died", signal=9))
    assert found is not None and "rank 1 was killed" in found.line
    found = judged(replace(by_launcher, since_s=2.0), status(1))
    assert found is not None and "rank 0 was ended (SIGTERM) in: phase 0" in found.line


def test_a_rank_that_failed_alone_ends_the_others_on_nodes_that_have_not_heard() -> None:
    line = "data.path: /data/x.jsonl does not exist"
    failed = status(2, condition="failed", text=line, node="b/1", since_s=1.0)
    others = status(0), status(1), status(3, node="b/1")
    assert judged(*others, failed) is None, "the others may be about to fail as well"
    found = judged(*others, replace(failed, since_s=6.0))
    assert found == Verdict(f"rank 2: {line}", (0,), hang=False)
    assert judged(status(0, condition="failed"), replace(failed, since_s=6.0)) is None
    # torchrun of the other node has ended its rank already, and does not know why.
    found = judged(status(0, condition="died", signal=15), failed)
    assert found == Verdict(f"rank 2: {line}", (0,), hang=False)


def test_one_process_is_the_run_and_those_who_ended_are_out_of_it() -> None:
    found = judged(hanging(0))
    assert found is not None and "watchdog: the run made no progress for 10 s" in found.line
    assert judged(status(0, condition="ended", idle_s=99.0)) is None


def test_the_time_in_a_condition() -> None:
    first = aged(status(0), None, 1.0)
    second = aged(status(0), first, 0.25)
    assert (first.since_s, second.since_s) == (0.0, 0.25)
    assert aged(status(0, condition="died"), second, 0.25).since_s == 0.0
