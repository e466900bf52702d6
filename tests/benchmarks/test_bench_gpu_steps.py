"""Steps of `make gpu` that die, hang, are refused or are cut short, and the run after that."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks.cases import CUT_SHORT, RESTART
from benchmarks.gpu import comparison
from benchmarks.gpu import steps as steps_module
from benchmarks.gpu.journal import Journal, key_of
from benchmarks.gpu.runner import Runner, Stage, table
from benchmarks.gpu.steps import Steps
from benchmarks.rows import append_line, read_cases

COMMON = {
    **{"device": "NVIDIA H100 80GB HBM3", "sources": "0123abcd", "torch": "2.11.0+cu130"},
    **{"triton": "3.6.0", "python": "3.12.3", "command": "c", "date": "d", "num_threads": 1},
}


@pytest.fixture
def steps(tmp_path, monkeypatch):
    monkeypatch.setattr(steps_module, "LEAST_S", 0.0)
    runner = Runner(tmp_path / "logs", budget_s=60, dry_run=True)
    return Steps(runner, Journal(tmp_path / "out", COMMON), "cpu")


def again(steps, **options):
    """The same command once more."""
    journal = Journal(steps.journal.path.parent, COMMON)
    journal.run = "later"
    return Steps(steps.runner, journal, "cpu", **options)


def python(program):
    return (sys.executable, "-c", program)


def statuses(steps):
    return [(row.case, row.status) for row in steps.journal.rows() if row.part == "stage"]


def test_the_file_is_named_after_what_must_be_the_same():
    name = "nvidia-h100-80gb-hbm3-0123abcd-2.11.0-cu130-3.6.0-3.12.3"
    assert key_of(COMMON) == name
    assert key_of(COMMON | {"sources": "x"}) != name and key_of(COMMON | {"triton": "3.9"}) != name


def test_a_step_that_passed_is_not_run_again_unless_asked(steps, tmp_path):
    mark = tmp_path / "mark"
    program = python(f"open({str(mark)!r}, 'a').write('x'); print('done')")
    assert steps.step("sweep-one", program, limit_s=30).status == "passed"
    later = again(steps)
    stage = later.step("sweep-one", program, limit_s=30)
    assert (stage.status, stage.seconds) == ("passed", 0.0)
    assert stage.detail == f"in an earlier run, {steps.journal.run}"
    assert mark.read_text() == "x"
    for names in (["sweep"], ["all"], ["sweep-one"]):
        again(steps, again=names).step("sweep-one", program, limit_s=30)
    assert mark.read_text() == "xxxx"
    again(steps, again=["compare"]).step("sweep-one", program, limit_s=30)
    assert mark.read_text() == "xxxx"


def test_again_reaches_the_program_and_the_comparison(steps, monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(
        Steps, "step", lambda self, name, command, **options: commands.append(command)
    )
    entry = comparison.Entry("compare-x", ("--op", "gae"), ("quack",))
    for names, expected in (((), False), (("smoke", "compare"), True)):
        some = again(steps, again=names)
        some.program("smoke", "--shapes", "tiny", limit_s=1.0, name="smoke-small")
        comparison._run(some, entry, 1.0)
        assert ("--again" in commands[-2]) == expected
        assert ("--resume" in commands[-1]) != expected


@pytest.mark.parametrize("death", ["os.kill(os.getpid(), 11)", f"sys.exit({RESTART})"])
def test_a_step_that_dies_starts_in_a_new_process_within_its_limit(death, steps, tmp_path):
    mark = tmp_path / "mark"
    program = python(
        f"import os, sys; f = {str(mark)!r}; n = os.path.exists(f) and len(open(f).read()) or 0\n"
        f"open(f, 'a').write('x'); print('try', n)\n"
        f"if n < 2: {death}"
    )
    stage = steps.step("profile", program, limit_s=30)
    assert (stage.status, stage.detail) == ("passed", "try 2")
    assert mark.read_text() == "xxx"
    assert statuses(steps) == [("profile", "failed"), ("profile", "failed"), ("profile", "passed")]


def test_one_that_dies_every_time_is_given_up(steps):
    stage = steps.step("sweep", python("import os; os.kill(os.getpid(), 9)"), limit_s=30)
    assert stage.status == "failed" and stage.code == -9
    assert stage.detail.startswith("ended by SIGKILL")
    assert statuses(steps) == [("sweep", "failed")] * steps_module.ATTEMPTS
    assert again(steps).step("sweep", python("print(1)"), limit_s=30).status == "passed"


def test_one_that_fails_by_itself_is_not_repeated_and_its_log_is_in_the_file(steps):
    stage = steps.step("build", python("print('x.cu(3): error'); raise SystemExit(1)"), limit_s=30)
    assert (stage.status, stage.detail) == ("failed", "x.cu(3): error")
    (row,) = steps.journal.rows()
    assert row.log == "x.cu(3): error\n" and row.reason == "x.cu(3): error"
    assert row.figures["first_line_s"] > 0


def test_one_that_hangs_is_ended_and_its_rows_and_the_next_steps_remain(steps):
    path = steps.journal.path
    row = {"part": "p", "case": "one", "status": "passed", **COMMON}
    program = f"open({str(path)!r}, 'a').write({json.dumps(row)!r} + chr(10) + '{{\"part\": \"p\"')"
    program += "; print('hanging', flush=True); import time; time.sleep(60)"
    start = time.monotonic()
    stage = steps.step("profile", python(program), limit_s=2)
    assert time.monotonic() - start < 30
    assert (stage.status, stage.bad, stage.detail) == ("out of time", True, "hanging")
    assert steps.step("sweep", python("print(1)"), limit_s=30).status == "passed"
    assert [row.case for row in read_cases([path])] == ["one", "profile", "sweep"]
    assert again(steps).step("profile", python("print(2)"), limit_s=30).detail == "2"


def test_one_that_is_cut_short_is_gone_on_with(steps):
    program = python(f"raise SystemExit({CUT_SHORT})")
    stage = steps.step("compare-2048", program, limit_s=30)
    assert (stage.status, stage.bad) == ("cut short", False)
    assert again(steps).step("compare-2048", python("print(3)"), limit_s=30).detail == "3"


def test_without_time_nothing_is_started(steps, monkeypatch):
    monkeypatch.setattr(steps_module, "LEAST_S", 100.0)
    stage = steps.step("sweep", python("print(1)"), limit_s=30)
    assert (stage.status, stage.detail) == ("not run", "no time left")
    assert not steps.journal.path.exists()


def test_a_run_goes_on_with_the_longest_file_that_it_finds(tmp_path):
    folders = [tmp_path / name for name in ("out", "logs", "results")]
    for folder, lines in zip(folders, (1, 3, 2), strict=True):
        journal = Journal(folder, COMMON)
        for index in range(lines):
            journal.record(Stage(f"s{index}", "passed", 1.0, "ok"), "log")
    journal = Journal(folders[0], COMMON, folders[1:], copies=folders[1])
    assert len(journal.rows()) == 3
    assert journal.passed("s2") is not None and journal.passed("s9") is None
    journal.record(Stage("s9", "failed", 1.0, "bad"), "log")
    assert (folders[1] / journal.path.name).read_text() == journal.path.read_text()
    other = Journal(folders[0], COMMON | {"sources": "changed"}, folders[1:])
    assert other.rows() == []


def test_a_piece_of_a_line_is_cut_off(tmp_path):
    journal = Journal(tmp_path, COMMON)
    append_line(journal.path, {"part": "p", "case": "one", "status": "passed", **COMMON})
    with journal.path.open("a") as file:
        file.write('{"part": "p", "case": "tw')
    (row,) = Journal(tmp_path, COMMON).rows()
    assert row.case == "one"


def sleeper(seconds):
    """A process with a child of its own, both of which sleep."""
    child = f"import time; time.sleep({seconds})"
    return (
        *(sys.executable, "-c"),
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        " print(p.pid, flush=True); p.wait()",
    )


def test_a_command_is_ended_at_its_limit_with_its_children(tmp_path):
    runner = Runner(tmp_path, budget_s=60, dry_run=False)
    start = time.monotonic()
    stage = runner.run("slow", sleeper(30), limit_s=1.5)
    assert time.monotonic() - start < 10
    assert stage.status == "out of time"
    assert stage.bad
    child = int((tmp_path / "slow.log").read_text())
    for _ in range(50):
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the child is still there")


def test_stages_end_as_their_commands_do(tmp_path, capsys):
    runner = Runner(tmp_path, budget_s=60, dry_run=False)
    good = runner.run("good", python("print('a'); print('all well')"), 30, echo=True)
    assert (good.status, good.detail, good.bad) == ("passed", "all well", False)
    assert "[good] a\n[good] all well\n" in capsys.readouterr().out
    bad = runner.run("bad", python("import sys; sys.exit('no compiler')"), 30)
    assert (bad.status, bad.detail, bad.bad) == ("failed", "no compiler", True)
    runner.deadline = time.monotonic()
    late = runner.run("late", python(""), 30)
    assert (late.status, late.bad) == ("not run", False)


def test_lines_are_shown_as_they_come(tmp_path):
    runner = Runner(tmp_path, budget_s=60, dry_run=False)
    stage = runner.run("slow", python("import time; print('first'); time.sleep(2)"), 30, echo=True)
    assert stage.first_line_s is not None and stage.first_line_s < stage.seconds - 1.5


def test_the_table_has_every_stage():
    stages = [Stage("build", "passed", 3.2, "ok"), Stage("tests", "failed", 60.0, "2 failed")]
    text = "\n".join(table(stages))
    assert "| build | passed | 3 | ok |" in text
    assert "| tests | failed | 60 | 2 failed |" in text
