"""The trainer's part of `make gpu`: that it works on this GPU, and how fast.

    torch      every stage in bf16 on the engine of one process, on a small real model
    gemma      PPO phases of Gemma-2B's shape, random weights: memory, time, MFU, the plan's error
    attention  every FlashAttention that is here against SDPA: tests, loss, gradients, times
    deepspeed  every stage again under DeepSpeed ZeRO-3
    real       SFT, reward model and as many PPO phases as fit on real preference data; curves

in this order of importance, each as processes of their own with a limit each; what the budget has
no room for is named. A part that fails is a row with its reason, and the others still run. Rows go
to `trainer/` of the results' folder, one JSON object a line (`benchmarks.trainer.rows`);
metrics.jsonl and the report's page of the real run stay in the logs' folder.

Needs the trainer's packages (pyproject.toml) in the Python that is used: without a network, carry
them in a folder on PYTHONPATH. A model and data are looked for in .carry/ and ../shared/:

    mkdir -p .carry; cp -r ../shared/models/stories260k .carry/model; cp -r ../shared/data .carry
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.runner import RESERVE_S, Runner, Stage, from_root
from benchmarks.rows import ROOT, environment, results_file

BUDGET_S = 345.0
_LEAST_S = 20.0
_MODELS = (ROOT / ".carry" / "model", ROOT.parent / "shared" / "models" / "stories260k")
_DATA = (ROOT / ".carry" / "data" / "hh_harmless", ROOT.parent / "shared" / "data" / "hh_harmless")
_PACKAGES = ("transformers", "datasets", "jsonargparse", "rapidfuzz", "rich", "jinja2", "yaml")


@dataclass(frozen=True)
class Inputs:
    """A small real model and a folder with train.jsonl of preference triples; None: not found."""

    model: Path | None
    data: Path | None


def find_inputs(model: Path | None, data: Path | None) -> Inputs:
    """Those given, else the first of the usual places that exists."""

    def first(given: Path | None, places: Iterable[Path]) -> Path | None:
        return next((p.resolve() for p in ([given] if given else places) if p.exists()), None)

    return Inputs(first(model, _MODELS), first(data, _DATA))


@dataclass
class _Context:
    runner: Runner
    rows: Path
    inputs: Inputs
    device: str

    def program(self, name: str, limit_s: float, *arguments: str, module: str = "") -> Stage:
        """A program of benchmarks.trainer that writes its rows into the file."""
        command = (
            *(sys.executable, "-m", f"benchmarks.trainer.{module or name}", "--name", name),
            *("--device", self.device, "--rows", str(self.rows), *arguments),
        )
        # A CPU needs longer, and its limit is there to end what hangs.
        limit_s *= 4 if self.runner.dry_run else 1
        return self.runner.run(f"trainer-{name}", command, limit_s, echo=True)

    @property
    def scratch(self) -> Path:
        return self.runner.logs / "work"

    def small(self) -> tuple[str, ...]:
        """Arguments that name the model and the data."""
        found = self.inputs
        return ("--model", str(found.model), "--data", str(found.data))


def _stages(context: _Context, engine: str) -> Iterable[Stage]:
    dtype = "float32" if context.runner.dry_run else "bfloat16"
    work = ("--work", str(context.scratch / engine), "--engine", engine, "--dtype", dtype)
    short = ("--tiny",) if context.runner.dry_run else ()
    yield context.program(engine, 110.0, *work, *short, *context.small(), module="stages")


def _gemma(context: _Context) -> Iterable[Stage]:
    shape = "tiny" if context.runner.dry_run else "gemma-2b"
    work = ("--work", str(context.scratch / "gemma"), "--shape", shape)
    yield context.program("gemma", 130.0, *work, module="phase")


def _attention(context: _Context) -> Iterable[Stage]:
    if not context.runner.dry_run:  # without a GPU they are skipped one and all
        tests = (sys.executable, "-m", "pytest", "tests/gpu/test_gpu_attention.py", "-q", "-p")
        yield context.runner.run("trainer-attention-tests", (*tests, "no:cacheprovider"), 60.0)
    shapes = "tiny" if context.runner.dry_run else "gemma-2b"
    yield context.program("attention", 45.0, "--shape", shapes)


def _real(context: _Context) -> Iterable[Stage]:
    """Everything that is left, less what its report takes."""
    left = seconds = context.runner.time_left_s() - RESERVE_S
    dtype = "float32" if context.runner.dry_run else "bfloat16"
    curves = ("--curves", str(context.runner.logs / "curves"), "--dtype", dtype)
    size = ("--tiny",) if context.runner.dry_run else ()
    work = ("--work", str(context.scratch / "real"), "--seconds", f"{seconds:.0f}")
    limit = left + RESERVE_S / 2
    yield context.program("real", limit, *work, *curves, *size, *context.small())


PARTS: dict[str, Callable[[_Context], Iterable[Stage]]] = {
    "torch": lambda context: _stages(context, "torch"),
    "gemma": _gemma,
    "attention": _attention,
    "deepspeed": lambda context: _stages(context, "deepspeed"),
    "real": _real,
}
"""The most important first."""
_NEED_INPUTS = ("torch", "deepspeed", "real")


def run_all(
    runner: Runner, folder: Path, device: torch.device, parts: Sequence[str], inputs: Inputs
) -> tuple[list[Stage], list[str]]:
    """Every part that is asked for: (stages, lines for the end)."""
    common = environment(device)
    rows = results_file(common["device"], common["date"], folder / "trainer")
    rows.parent.mkdir(parents=True, exist_ok=True)
    before = len(_read(rows))
    context = _Context(runner, from_root(rows.resolve()), inputs, device.type)
    stages: list[Stage] = []
    for part in parts:
        reason = _why_not(part, inputs)
        if reason:
            stages.append(Stage(f"trainer-{part}", "failed", 0.0, reason))
        elif runner.time_left_s() < _LEAST_S + RESERVE_S:
            stages.append(Stage(f"trainer-{part}", "not run", 0.0, "no time left"))
        else:
            stages += PARTS[part](context)
            continue
        print(f"[trainer-{part}] {stages[-1].status}: {stages[-1].detail}", flush=True)
    return stages, figures(_read(rows)[before:])


def _why_not(part: str, inputs: Inputs) -> str:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing and part != "attention":
        return f"not installed: {', '.join(missing)}; carry them in a folder on PYTHONPATH"
    if part in _NEED_INPUTS and inputs.model is None:
        return f"no model: give --model FOLDER or copy one to {from_root(_MODELS[0])}"
    if part in _NEED_INPUTS and inputs.data is None:
        return f"no preference data: give --data FOLDER or copy one to {from_root(_DATA[0])}"
    return ""


def _read(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def figures(rows: Sequence[dict]) -> list[str]:
    """Lines of a table with the rows of the programs."""
    lines = ["", "| part | case | status | s | |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        found = " ".join(f"{k} {_short(v)}" for k, v in row["figures"].items())
        said = row["reason"] or found
        lines.append(
            f"| {row['part']} | {row['case']} | {row['status']} | {row['seconds']:.1f} | {said} |"
        )
    return lines if rows else []


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
