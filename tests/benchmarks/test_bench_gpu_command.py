"""`make gpu` without a GPU: everything but the device."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.compare import CONTEXT_LOST, make_cases, parser
from benchmarks.gpu import Runner, Stage, compare, sanitize, summary
from benchmarks.providers import providers_named
from benchmarks.providers.ours import unavailable
from benchmarks.rows import ROOT, read_rows


def test_without_a_gpu_it_says_so_and_exits_with_2(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 2
    assert capsys.readouterr().out.startswith("no GPU: torch ")


@pytest.mark.slow
def test_dry_run_from_a_bare_checkout(tmp_path):
    """The real stages as processes; nothing but the two folders on the path."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/kernels:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[build] not run" in done.stdout or "csrc/build.py" in done.stdout
    assert "| tests | passed |" in done.stdout
    assert "| compare-0 | passed |" in done.stdout
    built = unavailable("linear_ppo_loss", "cpp", torch.device("cpu")) is None
    assert ("error over eager's" if built else "No row of ours with a time") in done.stdout
    rows = read_rows(tmp_path.glob("*.jsonl"))
    assert {row.op for row in rows} >= {"linear_ppo_loss", "gae"}
    assert any(row.p50_ms is not None for row in rows)
    assert all(row.command.startswith("python -m benchmarks.compare --device cpu") for row in rows)
    assert (tmp_path / "README.md").exists()
    assert (tmp_path / "summary.md").read_text().strip() in done.stdout
    assert (tmp_path / "tests.log").exists()


def sleeper(seconds):
    """A process with a child of its own, both of which sleep."""
    child = f"import time; time.sleep({seconds})"
    return (
        *(sys.executable, "-c"),
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        " print(p.pid, flush=True); p.wait()",
    )


def test_a_stage_is_ended_at_its_limit_with_its_children(tmp_path):
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


def test_stages_end_as_their_commands_do(tmp_path):
    runner = Runner(tmp_path, budget_s=60, dry_run=False)
    good = runner.run("good", (sys.executable, "-c", "print('a'); print('all well')"), 30)
    assert (good.status, good.detail, good.bad) == ("passed", "all well", False)
    bad = runner.run("bad", (sys.executable, "-c", "import sys; sys.exit('no compiler')"), 30)
    assert (bad.status, bad.detail, bad.bad) == ("failed", "no compiler", True)
    runner.deadline = time.monotonic()
    late = runner.run("late", (sys.executable, "-c", ""), 30)
    assert (late.status, late.bad) == ("not run", False)


def test_what_the_budget_has_no_room_for_is_named(tmp_path, capsys):
    runner = Runner(tmp_path, budget_s=5, dry_run=True)
    stages = compare(runner, tmp_path / "rows.jsonl")
    assert {stage.status for stage in stages} == {"not run"}
    assert "--shapes 64x32x1000" in stages[0].detail
    assert "no time left" in capsys.readouterr().out


def test_the_sanitizer_is_optional(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    (stage,) = sanitize(Runner(tmp_path, budget_s=60, dry_run=False))
    assert (stage.status, stage.bad) == ("not run", False)
    assert "compute-sanitizer is not installed" in capsys.readouterr().out


def test_memcheck_and_racecheck_run(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"; [ "$2" = memcheck ]\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    stages = {s.name: s for s in sanitize(Runner(tmp_path / "logs", budget_s=60, dry_run=False))}
    assert stages["sanitizer-memcheck"].status == "passed"
    assert stages["sanitizer-racecheck"].status == "failed"
    assert stages["sanitizer-memcheck"].detail.startswith("1 --tool memcheck --error-exitcode 9")


def test_the_summary_has_every_stage():
    stages = [Stage("build", "passed", 3.2, "ok"), Stage("tests", "failed", 60.0, "2 failed")]
    text = summary(stages, [])
    assert "| build | passed | 3 | ok |" in text
    assert "| tests | failed | 60 | 2 failed |" in text
    assert "No row of ours" in text


def test_the_plans_are_commands_that_compare_understands():
    for arguments, providers in (*gpu._PLAN, *gpu._TINY_PLAN):
        options = parser().parse_args([*arguments, "--providers", *providers])
        assert make_cases(options)
        assert providers_named(options.providers)


def test_a_provider_that_ends_the_context_is_left_out(tmp_path, monkeypatch):
    """A stand-in for python -m benchmarks.compare that verl breaks."""
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *verl*) echo "{CONTEXT_LOST}verl"; exit 3;; *) echo "$*";; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(gpu, "_TINY_PLAN", ((("--op", "gae"), ("quack", "verl", "cce")),))
    runner = Runner(tmp_path / "logs", budget_s=60, dry_run=True)
    (stage,) = compare(runner, tmp_path / "rows.jsonl")
    assert (stage.status, stage.name) == ("passed", "compare-0-without-verl")
    assert stage.detail.startswith(f"{CONTEXT_LOST}verl")
    assert "--providers quack cce" in (tmp_path / "logs/compare-0-without-verl.log").read_text()
