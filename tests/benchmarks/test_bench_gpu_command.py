"""`make gpu` without a GPU: everything but the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.compare import make_cases, parse_bytes, parser
from benchmarks.gpu import comparison, trainer
from benchmarks.gpu.__main__ import main, summary
from benchmarks.providers import providers_named
from benchmarks.providers.ours import unavailable
from benchmarks.rows import ROOT, append_line, read_cases, read_rows
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
    assert "[build] not run" in done.stdout and "[sanitizer] not run" in done.stdout
    stages = ("smoke", "ceilings", "profile", "sweep", "tests", "compare-tiny", "compare-workspace")
    for stage in stages:
        assert f"| {stage} | passed |" in done.stdout, done.stdout[-6000:]
    built = unavailable("linear_ppo_loss", "cpp", torch.device("cpu")) is None
    assert ("error over eager's" if built else "No row of ours with a time") in done.stdout
    (file,) = tmp_path.glob("*.jsonl")
    rows, cases = read_rows([file]), read_cases([file])
    assert {row.op for row in rows} >= {"linear_ppo_loss", "gae"}
    assert any(row.p50_ms is not None for row in rows)
    assert {row.workspace_bytes for row in rows} >= {None, 0, 200 * 1024, 2**20}
    assert all(row.command.startswith("python -m benchmarks.compare --resume") for row in rows)
    assert {row.part for row in cases if row.status == "passed"} >= {*stages[:4], "stage"}
    assert all(row.device and row.sources and row.versions["torch"] for row in cases)
    assert (tmp_path / "summary.md").read_text().strip() in done.stdout
    assert (tmp_path / "logs" / "tests.log").exists()
    assert not (tmp_path / "trainer").exists()

    # A second run has nothing left to do, and says since when.
    again = dry_run(tmp_path, "--only", "kernels")
    assert again.returncode == 0
    assert all(f"| {stage} | passed | 0 | in an earlier run" in again.stdout for stage in stages)
    assert read_rows([file]) == rows and read_cases([file]) == cases


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


def test_the_plans_are_commands_that_compare_understands():
    for entry in (*comparison.PLAN, *comparison.TINY_PLAN):
        options = parser().parse_args([*entry.arguments, "--providers", *entry.providers])
        assert make_cases(options)
        assert providers_named(options.providers)
        assert all(parse_bytes(text) >= 0 for text in options.workspaces)


def test_the_summary_has_every_kind_of_row(tmp_path):
    assert summary(tmp_path / "none.jsonl") == []
    path = tmp_path / "rows.jsonl"
    common = {"device": "NVIDIA H", "sources": "s", "command": "c", "date": "d", "torch": "2"}
    figures = {"tflops": 790.4, "p50_ms": 1.39}
    lost = {"part": "smoke", "case": "gae", "status": "failed", "reason": "no | kernel"}
    for row in (
        {"part": "ceilings", "case": "product", "status": "begun"},
        {"part": "ceilings", "case": "product", "status": "passed", "figures": figures},
        {"part": "stage", "case": "ceilings", "status": "passed"},
        lost,
    ):
        append_line(path, row | common)
    text = "\n".join(summary(path))
    assert "| product | 790 TFLOP/s | 1.39 |" in text
    assert "| smoke | gae | failed | no \\| kernel |" in text
    assert "No row of ours" in text and "| stage |" not in text
