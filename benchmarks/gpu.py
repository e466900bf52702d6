"""Everything that a machine with a GPU is for, in one command: `make gpu`.

    PYTHONPATH=kernels:. python3 -m benchmarks.gpu --out DIR

builds the CUDA part with this machine's torch, runs tests/gpu, compute-sanitizer over one small
case of each kernel, then the comparison with every installed provider, and ends with a short table.
It keeps a time budget by itself: each stage has a limit, and the shapes that matter least are
dropped and named. Works from a bare checkout. Exit status: 2 without a GPU, 1 if the build, a test
or the sanitizer failed, else 0; a missed limit is a row of the table.

--dry-run goes through the same stages on a CPU with tiny shapes, without building anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.compare import CONTEXT_LOST
from benchmarks.limits import verdicts
from benchmarks.report import latest, write
from benchmarks.rows import RESULTS, ROOT, Row, environment, read_rows, results_file

_BUDGET_S = 460.0
_LIMITS_S = {"build": 150.0, "tests": 130.0, "sanitizer": 60.0}
# Kept back from the comparison for the table, and to end a process that does not stop by itself.
_RESERVE_S = 10.0
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


@dataclass(frozen=True)
class Stage:
    """How one command ended. status: passed, failed, out of time, or not run."""

    name: str
    status: str
    seconds: float
    detail: str

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "out of time")


class Runner:
    """Commands with a limit each, and one budget for all. Output goes to <name>.log in `logs`."""

    def __init__(self, logs: Path, budget_s: float, dry_run: bool) -> None:
        self.logs = logs
        self.deadline = time.monotonic() + budget_s
        self.dry_run = dry_run
        logs.mkdir(parents=True, exist_ok=True)

    def time_left_s(self) -> float:
        return self.deadline - time.monotonic()

    def run(
        self,
        name: str,
        command: Sequence[str],
        limit_s: float,
        *,
        extra_env: dict[str, str] | None = None,
        echo: bool = False,
    ) -> Stage:
        """The command from the repository's root; it and its children are ended at the limit."""
        limit_s = min(limit_s, self.time_left_s())
        if limit_s <= 0:
            return self._done(Stage(name, "not run", 0.0, "no time left"))
        print(f"[{name}] {' '.join(command)}", flush=True)
        start = time.monotonic()
        log = self.logs / f"{name}.log"
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=_environment(extra_env or {}),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=limit_s)
                status = "passed" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = "out of time"
        text = log.read_text(encoding="utf-8", errors="replace").strip()
        if echo:
            print(text, flush=True)
        detail = text.rpartition("\n")[2][:160]
        return self._done(Stage(name, status, time.monotonic() - start, detail))

    def _done(self, stage: Stage) -> Stage:
        print(
            f"[{stage.name}] {stage.status} after {stage.seconds:.0f} s: {stage.detail}", flush=True
        )
        return stage


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
    left = runner.time_left_s() - _RESERVE_S
    if left < _LEAST_S:
        print(f"[{name}] not run: no time left for {' '.join(arguments)}", flush=True)
        return Stage(name, "not run", 0.0, "no time left for")
    device = "cpu" if runner.dry_run else "cuda"
    seconds, rounds = ("0.05", ("2", "3")) if runner.dry_run else ("1", ("5", "50"))
    command = (
        *(sys.executable, "-m", "benchmarks.compare", "--device", device, *arguments),
        *("--providers", *providers, "--seconds", seconds, "--rounds", *rounds),
        *("--budget", f"{left - _RESERVE_S / 2:.0f}", "--out", str(rows_file)),
    )
    stage = runner.run(name, command, left, echo=True)
    _, lost, culprit = stage.detail.partition(CONTEXT_LOST)
    if not lost:
        detail = "" if stage.status == "passed" else stage.detail
        return dataclasses.replace(stage, detail=detail)
    others = [provider for provider in providers if provider != culprit]
    again = _compare_part(runner, f"{name}-without-{culprit}", rows_file, arguments, others)
    return dataclasses.replace(again, detail=f"{stage.detail}; {again.detail}")


def summary(stages: Sequence[Stage], rows: Sequence[Row]) -> str:
    """Stages, then every claim with what was measured."""
    lines = ["", "| stage | status | s | |", "| --- | --- | --- | --- |"]
    lines += [f"| {s.name} | {s.status} | {s.seconds:.0f} | {s.detail} |" for s in stages]
    found = verdicts(latest(rows))
    if not found:
        return "\n".join([*lines, "", "No row of ours with a time."])
    lines += [
        "",
        "| operation | shape | ignored | mode | claim | measured | asked | met |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {v.row.op} | {v.row.shape} | {v.row.ignored:g} | {v.row.mode} | {v.claim} "
        f"| {v.measured} | {v.asked} | {'yes' if v.met else 'NO'} |"
        for v in found
    ]
    return "\n".join(lines)


def _from_root(path: Path) -> Path:
    """Shorter where it can be, since rows hold the command; every command starts in ROOT."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _environment(extra: dict[str, str]) -> dict[str, str]:
    """A bare checkout needs its two folders on the path; what is there already stays."""
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), **extra}


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0]
    )
    made.add_argument(
        "--out",
        type=Path,
        help="folder of rows and logs; by default rows go to "
        "benchmarks/results and logs to runs/gpu",
    )
    made.add_argument("--budget", type=float, default=_BUDGET_S, help="seconds for everything")
    made.add_argument("--dry-run", action="store_true", help="the same stages on a CPU, tiny")
    options = made.parse_args(arguments)
    if not (options.dry_run or torch.cuda.is_available()):
        print(f"no GPU: torch {torch.__version__} sees none here (--dry-run tries it on a CPU)")
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    common = environment(device)
    folder: Path = options.out or (ROOT / "runs" / "gpu" if options.dry_run else RESULTS)
    logs: Path = options.out or ROOT / "runs" / "gpu"
    rows_file = results_file(common["device"], common["date"], folder)
    print(f"{common['device']}, torch {common['torch']}, triton {common['triton']}")
    runner = Runner(logs.resolve(), options.budget, options.dry_run)
    stages = [build(runner), run_tests(runner), *sanitize(runner)]
    checked = list(stages)
    stages += compare(runner, _from_root(rows_file.resolve()))
    rows = read_rows([rows_file]) if rows_file.exists() else []
    write(folder)
    text = summary(stages, rows)
    (logs / "summary.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if any(stage.bad for stage in checked) else 0


if __name__ == "__main__":
    raise SystemExit(main())
