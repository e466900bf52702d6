"""What `make gpu` checks but does not time: build, tests, compute-sanitizer."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu.runner import Stage
from benchmarks.gpu.steps import Steps
from benchmarks.sanitize import ALIVE

BUILD_S, TESTS_S, WHOLE_GPU_S, SANITIZER_S = 150.0, 120.0, 60.0, 60.0
_PROCESSES = 4


def build(steps: Steps) -> Stage:
    """csrc with this machine's compilers and torch."""
    if steps.runner.dry_run:
        print("[build] not run: dry run")
        return Stage("build", "not run", 0.0, "dry run")
    command = (sys.executable, "csrc/build.py")
    return steps.step("build", command, limit_s=BUILD_S, env={"S2SRM_CUDA": "1"})


def run_tests(steps: Steps) -> list[Stage]:
    """Several processes, most of whose time goes into compiling; then what needs the whole GPU."""
    # Attention needs the packages of the trainer, whose part runs its tests.
    ignored = ("--ignore", "tests/gpu/test_gpu_attention.py")
    pytest = (sys.executable, "-m", "pytest", "tests/gpu", *ignored, "-q", "-rfE", "-p")
    pytest += ("no:cacheprovider",)
    processes = ()
    if importlib.util.find_spec("xdist") is not None and not steps.runner.dry_run:
        processes = ("-n", str(_PROCESSES))
    shared = (*pytest, "-m", "not whole_gpu", *processes)
    stages = [steps.step("tests", shared, limit_s=TESTS_S)]
    if not steps.runner.dry_run:  # without a GPU all of them are skipped in either
        whole = (*pytest, "-m", "whole_gpu")
        stages.append(steps.step("tests-whole-gpu", whole, limit_s=WHOLE_GPU_S))
    return stages


def sanitize(steps: Steps, tools: Sequence[str] = ("memcheck", "racecheck")) -> list[Stage]:
    """The tools at the same time; the allocator's cache would hide wild accesses.

    Where it complains before the program has made one small tensor, it is the machine that it does
    not support, as with some virtual ones: not run, and no failure.
    """
    tool = shutil.which("compute-sanitizer")
    if steps.runner.dry_run or tool is None:
        reason = "dry run" if steps.runner.dry_run else "compute-sanitizer is not installed"
        print(f"[sanitizer] not run: {reason}")
        return [Stage("sanitizer", "not run", 0.0, reason)]

    def check(name: str) -> Stage:
        return steps.step(
            f"sanitizer-{name}",
            (tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m", _SANITIZED),
            limit_s=SANITIZER_S,
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            refused=_refusal,
        )

    with ThreadPoolExecutor(len(tools)) as pool:
        return list(pool.map(check, tools))


_SANITIZED = "benchmarks.sanitize"


def _refusal(log: str) -> str | None:
    """The sanitizer's own complaint, where it let the program not make a single tensor."""
    own = [line for line in log.splitlines() if line.startswith("=====")]
    said = [line.strip("= ") for line in own if "rror" in line or "not supported" in line]
    return said[0][:160] if said and ALIVE not in log else None
