"""The stages of the kernels' part, with stand-ins for the tools of a GPU."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest
import torch

import s2srm_kernels
from benchmarks.cases import Cases, NotRun
from benchmarks.compare import CONTEXT_LOST
from benchmarks.definitions import VOCABULARY_OPS
from benchmarks.gpu import checks, comparison, counters, kernels, profile, smoke, sweep
from benchmarks.gpu import steps as steps_module
from benchmarks.gpu.checks import build, run_tests, sanitize
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.runner import Runner
from benchmarks.gpu.steps import Steps
from benchmarks.rows import environment, read_cases
from benchmarks.sanitize import ALIVE
from benchmarks.shapes import MODELS, Shape


@pytest.fixture
def steps(tmp_path, monkeypatch, cpu):
    monkeypatch.setattr(steps_module, "LEAST_S", 0.0)
    runner = Runner(tmp_path / "logs", budget_s=300, dry_run=False)
    return Steps(runner, Journal(tmp_path / "out", environment(cpu)), "cuda")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Stands for Python: prints its arguments."""

    def write(body='echo "$*"'):
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        return script

    return write


def tool(tmp_path, monkeypatch, name, body):
    script = tmp_path / name
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


def test_on_a_gpu_every_model_is_compiled_beside_the_others(steps, stand_in, capsys):
    stand_in()
    stages = {stage.name: stage for stage in kernels.smoke(steps)}
    assert set(stages) == {
        "smoke-small",
        "build",
        *(f"smoke-{model}" for model in MODELS),
        "smoke-sequences",
    }
    assert all(stage.status == "passed" for stage in stages.values())
    assert steps.runner.log("smoke-gemma-2b").endswith("--shapes gemma-2b:2048\n")
    assert f"--run {steps.journal.run} --shapes small" in steps.runner.log("smoke-small")
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split("]")[0] for line in lines if "smoke --name" in line]
    assert starts[-1] == "[smoke-sequences", "csrc has to be built before"


def test_a_failed_check_is_a_failure_and_a_failed_measurement_is_none(steps, stand_in, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    stand_in('case "$*" in *gpu.profile*|*gpu.sweep*) exit 1;; esac; echo "$*"')
    stages, failed = kernels.run_all(steps)
    assert not failed and {s.name for s in stages if s.bad} == {"profile", "sweep"}
    order = [stage.name.partition("-")[0] for stage in stages]
    assert list(dict.fromkeys(order)) == [
        *("smoke", "build", "ceilings", "profile", "sweep"),
        *("compare", "tests", "counters", "sanitizer"),
    ]
    stand_in('case "$*" in *pytest*) exit 1;; esac; echo "$*"')
    steps = Steps(steps.runner, steps.journal, "cuda", again=["tests"])
    _, failed = kernels.run_all(steps, ["tests"])
    assert failed


def test_tests_run_side_by_side_and_those_that_need_the_whole_gpu_alone(steps, stand_in):
    stand_in()
    shared, whole = run_tests(steps)
    assert "-m not whole_gpu -n 4" in shared.detail
    assert "--ignore tests/gpu/test_gpu_attention.py" in shared.detail, "the trainer's packages"
    assert "-m whole_gpu" in whole.detail and "-n" not in whole.detail.split()


def test_the_big_tests_are_marked(request):
    """Whatever asks for tens of gigabytes may not run beside another such test."""
    file = Path(__file__).parents[1] / "gpu" / "test_gpu_vocabulary.py"
    found = [
        node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and "mem_get_info" in ast.unparse(node)
    ]
    assert found
    for node in found:
        assert any("whole_gpu" in ast.unparse(one) for one in node.decorator_list), node.name


def test_the_build_insists_on_cuda(steps, stand_in):
    stand_in('echo "S2SRM_CUDA=$S2SRM_CUDA $*"')
    assert build(steps).detail == "S2SRM_CUDA=1 csrc/build.py"


def test_the_sanitizer_is_optional(steps, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    (stage,) = sanitize(steps)
    assert (stage.status, stage.bad) == ("not run", False)
    assert "compute-sanitizer is not installed" in capsys.readouterr().out


def test_memcheck_and_racecheck_run(steps, tmp_path, monkeypatch):
    says = f'echo "{ALIVE}"; echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"; [ "$2" = memcheck ]'
    tool(tmp_path, monkeypatch, "compute-sanitizer", says)
    stages = {stage.name: stage for stage in sanitize(steps)}
    assert stages["sanitizer-memcheck"].status == "passed"
    assert stages["sanitizer-racecheck"].status == "failed"
    assert stages["sanitizer-memcheck"].detail.startswith("1 --tool memcheck --error-exitcode 9")


def test_a_gpu_that_the_sanitizer_refuses_is_no_failure(steps, tmp_path, monkeypatch):
    refusal = 'echo "========= Error: Device not supported. See the list"; echo "error 999"; exit 1'
    tool(tmp_path, monkeypatch, "compute-sanitizer", refusal)
    for stage in sanitize(steps):
        assert (stage.status, stage.bad) == ("not run", False)
        assert stage.detail == "Error: Device not supported. See the list"
    rows = [row for row in steps.journal.rows() if row.part == "stage"]
    assert {row.status for row in rows} == {"not run"}
    assert all("Device not supported" in row.reason for row in rows)


def test_a_program_that_does_not_start_is_a_failure_of_the_sanitizer(steps, tmp_path, monkeypatch):
    broken = 'echo "========= COMPUTE-SANITIZER"; echo "ImportError: no module"; exit 1'
    tool(tmp_path, monkeypatch, "compute-sanitizer", broken)
    assert all(stage.status == "failed" for stage in sanitize(steps))


def test_a_comparison_that_loses_its_context_starts_again(steps, stand_in, tmp_path):
    """A stand-in for python -m benchmarks.compare that three providers break."""
    mark = tmp_path / "mark"
    lose = f'[ $(wc -l < {mark}) -gt 3 ] || {{ echo "{CONTEXT_LOST}verl"; exit 3; }}'
    stand_in(f'echo x >> {mark}; {lose}; echo "$*"')
    entry = comparison.Entry("compare-x", ("--op", "gae"), ("quack", "verl", "cce"))
    stage = comparison._run(steps, entry, 60.0)
    assert stage.status == "passed"
    assert "--resume" in steps.runner.log("compare-x")
    assert mark.read_text() == "x\n" * 4


def test_what_the_comparison_has_no_time_for_is_named(steps, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "LEAST_S", 100.0)
    stages = comparison.compare(steps, 50.0)
    assert {stage.status for stage in stages} == {"not run"}
    assert [stage.name for stage in stages] == [entry.name for entry in comparison.PLAN]
    assert "--shapes gemma-2b:8192" in stages[0].detail
    assert "no time left" in capsys.readouterr().out


def test_counters_are_read_from_ncus_table(tmp_path, monkeypatch):
    page = (
        'a line of the program\n==PROF== Profiling "statistics_kernel"\n'
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","statistics_kernel","GPU Speed Of Light","Memory Throughput","%","31.5"\n'
        '"0","statistics_kernel","Occupancy","Registers","","168"\n'
        '"0","statistics_kernel","Occupancy","","",""\n'
    )
    assert counters.read(page) == {
        "GPU Speed Of Light: Memory Throughput [%]": "31.5",
        "Occupancy: Registers": "168",
    }
    assert counters.read("==ERROR== ERR_NVGPUCTRPERM") == {}
    (tmp_path / "page.csv").write_text(page)
    tool(tmp_path, monkeypatch, "ncu", f"cat {tmp_path / 'page.csv'}")
    assert len(counters.counters("statistics_kernel", "linear_token_stats", "gemma-2b:8192")) == 2


def test_ncu_that_is_missing_or_refused_is_a_case_that_was_not_run(tmp_path, monkeypatch, cpu):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotRun, match="ncu is not installed"):
        counters.counters("statistics_kernel", "linear_token_stats", "gemma-2b:8192")
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    refusal = "==ERROR== Failed to initialize the profiler: LibraryNotLoaded"
    tool(tmp_path, monkeypatch, "ncu", f'echo "a line"; echo "{refusal}"; exit 1')
    arguments = ("--name", "counters", "--device", "cpu", "--rows", str(tmp_path / "rows.jsonl"))
    assert counters.main(arguments) == 0
    rows = [row for row in read_cases([tmp_path / "rows.jsonl"]) if row.status != "begun"]
    assert len(rows) == len(counters.KERNELS) == 3
    assert all(row.status == "not run" for row in rows)
    assert "exit status 1: ==ERROR== Failed to initialize the profiler" in rows[0].reason


def test_the_kernels_that_are_counted_exist():
    folder = Path(s2srm_kernels.__file__).parent / "triton"
    source = "".join(file.read_text() for file in sorted(folder.glob("*.py")))
    for kernel, op in counters.KERNELS:
        assert f"def {kernel}(" in source and op in VOCABULARY_OPS


def test_smoke_fails_where_an_operation_is_wrong(tmp_path, monkeypatch, cpu):
    shape = Shape("s", 20, 8, 50)
    arguments = ("linear_token_stats", shape, torch.float32, cpu, "reference", None)
    assert smoke.vocabulary_case(*arguments)["eager_error"] > 0
    right = s2srm_kernels.linear_token_stats

    def wrong(*args, **keywords):
        made = right(*args, **keywords)
        return made._replace(lse=made.lse + 1e-3)

    monkeypatch.setattr(s2srm_kernels, "linear_token_stats", wrong)
    with pytest.raises(AssertionError, match="'lse'"):
        smoke.vocabulary_case(*arguments)


def test_profile_names_what_takes_the_time(cpu):
    found = profile.kernel_times("linear_token_stats", Shape("s", 64, 32, 500), "reference", cpu)
    assert found["call_ms"] > 0 and found["kernels_ms"] == pytest.approx(
        found["call_ms"] - found["gap_ms"]
    )
    assert any("linear_token_stats" in name for name in found["kernels"])


def test_a_candidate_is_in_force_inside_the_block_alone():
    configs = pytest.importorskip("s2srm_kernels.triton.configs")
    ask = ("statistics", "sm_90", torch.bfloat16, True)
    shipped = configs.logits_tile(*ask), configs.split_columns(256000)
    candidate = sweep.Candidate("x", {"group": 99, "num_stages": 7}, split_columns=512)
    with pytest.raises(KeyError), sweep.configured(candidate):
        inside = configs.logits_tile(*ask)
        assert (inside.group, inside.num_stages, inside.block_m) == (99, 7, shipped[0].block_m)
        assert configs.split_columns(256000) == 512
        raise KeyError
    assert (configs.logits_tile(*ask), configs.split_columns(256000)) == shipped


@pytest.mark.parametrize("candidate", sweep.CANDIDATES, ids=lambda c: c.name)
def test_candidates_change_fields_that_there_are(candidate):
    configs = pytest.importorskip("s2srm_kernels.triton.configs")
    with sweep.configured(candidate):
        tile = configs.logits_tile("statistics", "sm_90", torch.bfloat16, True)
        assert configs.split_columns(256000) % tile.block_n == 0


def test_a_candidate_with_other_bits_is_not_timed(monkeypatch, cpu):
    """Eager stands for our kernels, wrong under one candidate."""
    from benchmarks.providers.eager import Eager

    current = []

    class Ours(Eager):
        def __init__(self, impl):
            pass

        def build(self, op, problem):
            run = super().build(op, problem)
            off = {"wild": 1.001, "split far": 1.1, "split near": 1 + 1e-6}

            def call():
                made = run()
                if current[-1:] == ["breaks"]:
                    raise RuntimeError("out of resource: shared memory")
                factor = off.get(current[-1] if current else "", 1.0)
                return {name: value * factor for name, value in made.items()}

            return call

    class configured:
        def __init__(self, candidate):
            self.name = candidate.name

        def __enter__(self):
            current.append(self.name)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(sweep, "Ours", Ours)
    monkeypatch.setattr(sweep, "configured", configured)
    candidates = [
        *(sweep.Candidate(name) for name in ("same", "wild", "breaks")),
        *(sweep.Candidate(name, split_columns=512) for name in ("split near", "split far")),
    ]
    shape = Shape("s", 16, 8, 50)
    found = sweep.sweep("linear_logprobs", shape, cpu, candidates, (1, 2))
    assert found["same"] > 0 and found["shipped_ms"] > 0
    assert found["wild (other bits)"].startswith("not timed: other logprobs")
    assert found["breaks"] == "RuntimeError: out of resource: shared memory"
    assert found["split near (other bits)"] > 0
    assert found["split far (other bits)"].startswith("not timed: other")


def test_parts_are_told_apart_in_one_file(tmp_path):
    common = {"device": "d", "sources": "s", "command": "c", "date": "d"}
    for part in ("smoke", "sweep"):
        Cases(tmp_path / "rows.jsonl", part, common, "now").run_all([("one", dict)])
    assert {row.part for row in read_cases([tmp_path / "rows.jsonl"])} == {"smoke", "sweep"}
    assert checks.SANITIZER_S < kernels.BUDGET_S
