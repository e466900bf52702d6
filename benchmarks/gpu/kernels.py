"""The kernels' part of `make gpu`: build, tests, compute-sanitizer, comparison.

Builds the CUDA part with this machine's torch, runs tests/gpu, compute-sanitizer over one small
case of each kernel, then the comparison with every installed provider. The shapes that matter least
are dropped and named when the time is up.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.compare import CONTEXT_LOST
from benchmarks.gpu.runner import RESERVE_S, Runner, Stage, from_root
from benchmarks.limits import verdicts
from benchmarks.report import latest, write
from benchmarks.rows import Row, environment, read_rows, results_file

BUDGET_S = 460.0
_LIMITS_S = {"build": 150.0, "tests": 130.0, "sanitizer": 60.0}
_LEAST_S = 15.0
_VOCABULARY = (
    "--op",
    *("linear_cross_entropy", "linear_ppo_loss", "linear_logprobs", "linear_token_stats"),
)
_OURS = ("s2srm-triton", "s2srm-triton-recompute", "s2srm-cpp", "s2srm-reference")
_PEERS = (
    *("torch-eager", "torch-chunked", "torch-padded"),
    *("liger-triton", "liger-triton-fp32", "liger-sm90", "liger-scaled", "liger-grpo"),
    *("cce", "cce-exact", "quack", "verl"),
)
_EVERYONE = (*_OURS, *_PEERS)
# The comparison, most important first: arguments and providers. Ours and eager come by themselves
# before the peers, some of which compile for a minute; the later row of a call counts. One process
# each: an illegal access in one kernel ends the CUDA context of its process.
_PLAN = (
    ((*_VOCABULARY, "--shapes", "gemma-2b:8192", "llama-2-7b:8192"), (*_OURS[:2], _PEERS[0])),
    (("--op", "gae", "token_rewards"), _EVERYONE),
    ((*_VOCABULARY, "--shapes", "gemma-2b:8192"), _EVERYONE),
    ((*_VOCABULARY, "--shapes", "llama-2-7b:8192"), _EVERYONE),
    ((*_VOCABULARY, "--shapes", "llama-3-8b:8192"), _EVERYONE),
    ((*_VOCABULARY, "--shapes", "gemma-2b:8192", "--ignored", "0.4"), _EVERYONE),
    ((*_VOCABULARY, "--shapes", "gemma-3-270m:8192", "smollm2-135m:8192"), _EVERYONE),
    ((*_VOCABULARY, "--shapes", "models:2048"), _EVERYONE),
    ((*_VOCABULARY, "--shapes", "models:16384", "--ignored", "0", "0.4"), _EVERYONE),
)
_TINY = ("s2srm-cpp", "s2srm-reference", "torch-eager", "torch-padded", "quack")
_TINY_PLAN = (
    ((*_VOCABULARY, "--shapes", "64x32x1000", "--ignored", "0.4"), _TINY),
    (("--op", "gae", "token_rewards", "--sequences", "1000/7"), _TINY),
)


def build(runner: Runner) -> Stage:
    command = (sys.executable, "csrc/build.py")
    if runner.dry_run:
        print(f"[build] {' '.join(command)}")
        return Stage("build", "not run", 0.0, "dry run")
    return runner.run("build", command, _LIMITS_S["build"], extra_env={"S2SRM_CUDA": "1"})


def run_tests(runner: Runner) -> Stage:
    """Several processes where pytest-xdist is there: most of the time goes into compiling."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None and not runner.dry_run:
        command += ["-n", "4"]
    return runner.run("tests", command, _LIMITS_S["tests"])


def sanitize(runner: Runner) -> list[Stage]:
    """memcheck and racecheck at the same time; the allocator's cache would hide wild accesses."""
    tool = shutil.which("compute-sanitizer")
    if runner.dry_run or tool is None:
        reason = "dry run" if runner.dry_run else "compute-sanitizer is not installed"
        print(f"[sanitizer] not run: {reason}")
        return [Stage("sanitizer", "not run", 0.0, reason)]

    def check(name: str) -> Stage:
        return runner.run(
            f"sanitizer-{name}",
            (tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m", _SANITIZED),
            _LIMITS_S["sanitizer"],
            extra_env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(check, ("memcheck", "racecheck")))


_SANITIZED = "benchmarks.sanitize"


def compare(runner: Runner, rows_file: Path) -> list[Stage]:
    """The plan until the time is up; what is left out is named."""
    stages: list[Stage] = []
    for index, (arguments, providers) in enumerate(_TINY_PLAN if runner.dry_run else _PLAN):
        stage = _compare_part(runner, f"compare-{index}", rows_file, arguments, providers)
        stages.append(dataclasses.replace(stage, detail=f"{stage.detail} {' '.join(arguments)}"))
    return stages


def _compare_part(
    runner: Runner,
    name: str,
    rows_file: Path,
    arguments: Sequence[str],
    providers: Sequence[str],
) -> Stage:
    """One process; once more for each provider that ends its CUDA context, without that one."""
    left = runner.time_left_s() - RESERVE_S
    if left < _LEAST_S:
        print(f"[{name}] not run: no time left for {' '.join(arguments)}", flush=True)
        return Stage(name, "not run", 0.0, "no time left for")
    device = "cpu" if runner.dry_run else "cuda"
    seconds, rounds = ("0.05", ("2", "3")) if runner.dry_run else ("1", ("5", "50"))
    command = (
        *(sys.executable, "-m", "benchmarks.compare", "--device", device, *arguments),
        *("--providers", *providers, "--seconds", seconds, "--rounds", *rounds),
        *("--budget", f"{left - RESERVE_S / 2:.0f}", "--out", str(rows_file)),
    )
    stage = runner.run(name, command, left, echo=True)
    _, lost, culprit = stage.detail.partition(CONTEXT_LOST)
    if not lost:
        detail = "" if stage.status == "passed" else stage.detail
        return dataclasses.replace(stage, detail=detail)
    others = [provider for provider in providers if provider != culprit]
    again = _compare_part(runner, f"{name}-without-{culprit}", rows_file, arguments, others)
    return dataclasses.replace(again, detail=f"{stage.detail}; {again.detail}")


def run_all(
    runner: Runner, folder: Path, device: torch.device
) -> tuple[list[Stage], bool, list[str]]:
    """Everything of this part: (stages, whether a check failed, lines for the end).

    A comparison that missed its limit is a row of the table and fails nothing.
    """
    common = environment(device)
    rows_file = results_file(common["device"], common["date"], folder)
    checked = [build(runner), run_tests(runner), *sanitize(runner)]
    compared = compare(runner, from_root(rows_file.resolve()))
    rows = read_rows([rows_file]) if rows_file.exists() else []
    write(folder)
    return checked + compared, any(stage.bad for stage in checked), claims(rows)


def claims(rows: Sequence[Row]) -> list[str]:
    """Lines of a table with every claim and what was measured."""
    found = verdicts(latest(rows))
    if not found:
        return ["", "No row of ours with a time."]
    lines = [
        "",
        "| operation | shape | ignored | mode | claim | measured | asked | met |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {v.row.op} | {v.row.shape} | {v.row.ignored:g} | {v.row.mode} | {v.claim} "
        f"| {v.measured} | {v.asked} | {'yes' if v.met else 'NO'} |"
        for v in found
    ]
    return lines
