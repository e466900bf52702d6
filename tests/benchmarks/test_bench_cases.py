"""Cases of a program: each is a row, and a second process goes on where the first stopped."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from benchmarks.cases import RESTART, Cases, NotRun, is_context_lost
from benchmarks.rows import read_cases

COMMON = {"device": "CPU X", "sources": "abc", "command": "c", "date": "d", "torch": "2.11"}


def made(tmp_path, run="now", part="p", again=False):
    return Cases(tmp_path / "rows.jsonl", part, COMMON, run, again)


def ended(tmp_path):
    rows = read_cases([tmp_path / "rows.jsonl"])
    return [(row.case, row.status) for row in rows if row.status != "begun"]


def fail():
    raise RuntimeError("no\nkernel image")


def skip():
    raise NotRun("no GPU")


def lose():
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


def test_every_case_is_a_row_and_a_failure_stops_nobody(tmp_path, capsys):
    cases = made(tmp_path)
    found = [("good", lambda: {"tflops": 1.5}), ("bad", fail), ("absent", skip), ("last", dict)]
    assert cases.run_all(found) == 1
    assert ended(tmp_path) == [
        ("good", "passed"),
        ("bad", "failed"),
        ("absent", "not run"),
        ("last", "passed"),
    ]
    rows = {row.case: row for row in read_cases([tmp_path / "rows.jsonl"])}
    assert rows["good"].figures == {"tflops": 1.5}
    assert rows["good"].versions == {"torch": "2.11"} and rows["good"].run == "now"
    assert rows["bad"].reason == "RuntimeError: no kernel image"
    assert rows["absent"].reason == "no GPU"
    assert "p good: passed after 0.0 s: tflops=1.5" in capsys.readouterr().out


def test_what_passed_is_not_run_again_and_what_failed_is_by_another_command(tmp_path):
    ran = []
    cases = [
        ("good", lambda: ran.append("good") or {}),
        ("bad", lambda: ran.append("bad") or fail()),
        ("absent", lambda: ran.append("absent") or skip()),
    ]
    assert made(tmp_path, "monday").run_all(cases) == 1
    assert made(tmp_path, "monday").run_all(cases) == 1, "the failure of this command counts"
    assert ran == ["good", "bad", "absent"]
    assert made(tmp_path, "tuesday").run_all(cases) == 1
    assert ran == ["good", "bad", "absent", "bad", "absent"]
    assert made(tmp_path, "tuesday", part="other").run_all(cases[:1]) == 0
    assert ran[5:] == ["good"]
    for _ in range(2):
        assert made(tmp_path, "wednesday", again=True).run_all(cases[:1]) == 0
    assert ran[6:] == ["good"], "once in that command, whose first process may have died"


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("CUDA error: out of memory", False),
        ("CUDA out of memory. Tried to allocate 20.00 GiB", False),
        ("out of resource: shared memory, Required: 233472", False),
    ],
)
def test_after_which_error_the_context_is_dead(message, lost):
    assert is_context_lost(RuntimeError(message)) == lost


def test_a_dead_context_asks_for_a_new_process_which_does_the_rest(tmp_path):
    cases = [("first", dict), ("wild", lose), ("last", dict)]
    assert made(tmp_path).run_all(cases) == RESTART
    assert ended(tmp_path) == [("first", "passed"), ("wild", "failed")]
    assert made(tmp_path).run_all(cases) == 1
    assert ended(tmp_path)[2:] == [("last", "passed")]


def test_what_killed_its_process_comes_after_the_others(tmp_path):
    def program():
        def die():
            os.kill(os.getpid(), signal.SIGKILL)

        made(tmp_path).run_all([("first", dict), ("deadly", die), ("last", dict)])

    for expected in ([("first", "passed")], [("first", "passed"), ("last", "passed")]):
        process = multiprocessing.get_context("fork").Process(target=program)
        process.start()
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL
        assert ended(tmp_path) == expected
