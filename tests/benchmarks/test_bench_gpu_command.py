"""`make gpu` without a GPU: everything but the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.compare import CONTEXT_LOST, make_cases, parser
from benchmarks.gpu import kernels, trainer
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.kernels import claims, compare, sanitize
from benchmarks.gpu.runner import Runner, Stage, table
from benchmarks.providers import providers_named
from benchmarks.providers.ours import unavailable
from benchmarks.rows import ROOT, read_rows
from benchmarks.trainer.mfu import Size, peak_of, phase_flops
from benchmarks.trainer.random_model import SHAPES


def test_without_a_gpu_it_says_so_and_exits_with_2(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("no GPU: torch ")


def dry_run(tmp_path, *arguments):
    """The real stages as processes; nothing but the two folders on the path."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/kernels:{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.slow
def test_dry_run_of_the_kernels_from_a_bare_checkout(tmp_path):
    done = dry_run(tmp_path, "--only", "kernels")
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
    assert not (tmp_path / "trainer").exists()


@pytest.mark.slow
def test_dry_run_of_the_trainer(tmp_path):
    """Every part on a small real model and real triples, where they lie beside the checkout."""
    inputs = trainer.find_inputs(None, None)
    if inputs.model is None or inputs.data is None:
        pytest.skip("no ../shared/models/stories260k and ../shared/data beside the checkout")
    data = inputs.data.parent / "polite"
    more = ("--only", "trainer", "--budget", "800", "--data", str(data))
    done = dry_run(tmp_path, *more)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    for part in trainer.PARTS:
        assert f"| trainer-{part} | passed |" in done.stdout
    (file,) = (tmp_path / "trainer").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(row["status"] != "failed" and row["torch"] and row["date"] for row in rows)
    passed = {(row["part"], row["case"]) for row in rows if row["status"] == "passed"}
    every = {"sft", "rm", "scalar-rm", "ppo seq2seq", "ppo scalar"}
    assert passed >= {(engine, case) for engine in ("torch", "deepspeed") for case in every}
    assert passed >= {("gemma", "tiny phase"), ("attention", "sdpa"), ("real", "ppo seq2seq")}
    phase = next(row["figures"] for row in rows if row["case"] == "tiny phase")
    spent = phase["rollout_s"] + phase["reward_s"] + phase["update_s"]
    assert phase["phase_s"] == pytest.approx(spent) and phase["phase_tflop"] > 0
    assert "mfu" not in phase, "there is no peak of a CPU in the table"
    curves = {path.name for path in (tmp_path / "curves").iterdir()}
    assert curves >= {"ppo-seq2seq-metrics.jsonl", "rm-metrics.jsonl", "report.html"}
    assert (tmp_path / "summary.md").read_text().strip() in done.stdout


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Stands for Python in the trainer's programs: stages fail, the rest pass and leave a row."""
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in *trainer.stages*) echo "no kernel image"; exit 1;; esac\n'
        'while [ "$1" != --rows ]; do shift; done\n'
        'echo \'{"part": "x", "case": "y", "status": "passed", "reason": null, "seconds": 1,'
        ' "figures": {"mfu": 0.123456}}\' >> "$2"\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return script


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path, stand_in, capsys):
    arguments = ["--dry-run", "--out", str(tmp_path / "out"), "--only", "torch", "gemma"]
    assert main([*arguments, "--model", str(tmp_path), "--data", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "| trainer-torch | failed |" in told and "no kernel image |" in told
    assert "| trainer-gemma | passed |" in told
    assert "| x | y | passed | 1.0 | mfu 0.1235 |" in told
    assert "attention" not in told
    assert main([*arguments[:-2], "gemma"]) == 0


def test_what_a_part_needs_and_is_not_there_is_a_failure(tmp_path, stand_in, monkeypatch, capsys):
    arguments = ["--dry-run", "--out", str(tmp_path / "out"), "--only"]
    lacking = [*arguments, "torch", "--model", str(tmp_path / "none")]
    assert main(lacking) == 1
    assert "no model: give --model FOLDER or copy one to .carry/model" in capsys.readouterr().out
    monkeypatch.setattr(trainer, "_PACKAGES", ("transformers", "surely_not_installed"))
    assert main([*arguments, "gemma"]) == 1
    assert "not installed: surely_not_installed; carry" in capsys.readouterr().out


def test_what_the_budget_leaves_no_time_for_is_named(tmp_path, stand_in, capsys):
    arguments = ["--dry-run", "--out", str(tmp_path / "out"), "--budget", "5"]
    assert main([*arguments, "--only", "gemma", "attention"]) == 0
    assert "| trainer-attention | not run | 0 | no time left |" in capsys.readouterr().out


def test_operations_of_a_phase():
    """Gemma-2B's known size, and a phase of it counted by hand."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(SHAPES["gemma-2b"])
    assert sum(p.numel() for p in lm.parameters()) == 2_506_172_416
    size = Size.of(lm, lm.config)
    assert size.head_weights == 256000 * 2048
    assert size.layers_weights == 2_506_172_416 - size.head_weights - 37 * 2048
    found = phase_flops(size, count=2, prompt=3, response=5, epochs=4)
    trunk = 2 * size.layers_weights * 16 + 2 * 8 * 256 * 18 * 16 * 8
    head = 2 * size.head_weights * 10
    assert found["rollout"] == trunk + head
    assert found["update"] == 12 * (2 * trunk + head)
    rm = 2 * size.layers_weights * 26 + 2 * 8 * 256 * 18 * 26 * 13 + head
    assert found["reward"] == rm + 3 * trunk + 2 * head
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12 and peak_of("CPU") is None


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
    text = "\n".join([*table(stages), *claims([])])
    assert "| build | passed | 3 | ok |" in text
    assert "| tests | failed | 60 | 2 failed |" in text
    assert "No row of ours" in text


def test_the_plans_are_commands_that_compare_understands():
    for arguments, providers in (*kernels._PLAN, *kernels._TINY_PLAN):
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
    monkeypatch.setattr(kernels, "_TINY_PLAN", ((("--op", "gae"), ("quack", "verl", "cce")),))
    runner = Runner(tmp_path / "logs", budget_s=60, dry_run=True)
    (stage,) = compare(runner, tmp_path / "rows.jsonl")
    assert (stage.status, stage.name) == ("passed", "compare-0-without-verl")
    assert stage.detail.startswith(f"{CONTEXT_LOST}verl")
    assert "--providers quack cce" in (tmp_path / "logs/compare-0-without-verl.log").read_text()
