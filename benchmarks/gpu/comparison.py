"""The comparison's part of `make gpu`: what is asked of benchmarks.compare, the most telling first.

A process for each entry, since an illegal access in one kernel ends the CUDA context of its
process; it then starts again behind what it had measured. Each entry takes as long as there is time
for the comparison; the next run goes on with what was left out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from benchmarks.gpu.runner import Stage
from benchmarks.gpu.steps import LEAST_S, Steps

_VOCABULARY = (
    "--op",
    *("linear_cross_entropy", "linear_ppo_loss", "linear_logprobs", "linear_token_stats"),
)
_LOSSES = ("--op", "linear_cross_entropy", "linear_ppo_loss")
_OURS = ("s2srm-triton", "s2srm-triton-recompute", "s2srm-cpp", "s2srm-reference")
_PEERS = (
    *("torch-eager", "torch-chunked", "torch-padded"),
    *("liger-triton", "liger-triton-fp32", "liger-sm90", "liger-scaled", "liger-grpo"),
    *("cce", "cce-exact", "quack", "verl"),
)
_EVERYONE = (*_OURS, *_PEERS)
_BOUNDS = ("0", "256M", "1G", "2G", "4G", "8G", "16G")


@dataclass(frozen=True)
class Entry:
    """One process of the comparison: arguments of benchmarks.compare."""

    name: str
    arguments: tuple[str, ...]
    providers: tuple[str, ...] = _EVERYONE


def _curve(shapes: tuple[str, ...], bounds: tuple[str, ...], *more: str) -> tuple[str, ...]:
    """Time against memory: ours under one bound of the workspace after the other."""
    mode = ("--mode", "forward+backward")
    return (*_LOSSES, "--shapes", *shapes, *mode, "--workspaces", *bounds, *more)


# Ours and eager come by themselves before the peers, some of which compile for a minute; the later
# row of a call counts.
PLAN = (
    Entry(
        "compare-ours",
        (*_VOCABULARY, "--shapes", "gemma-2b:8192", "llama-2-7b:8192", "llama-3-8b:8192"),
        (*_OURS[:2], "torch-eager"),
    ),
    Entry("compare-sequences", ("--op", "gae", "token_rewards")),
    Entry("compare-gemma-2b", (*_VOCABULARY, "--shapes", "gemma-2b:8192")),
    Entry("compare-llama-2-7b", (*_VOCABULARY, "--shapes", "llama-2-7b:8192")),
    Entry("compare-llama-3-8b", (*_VOCABULARY, "--shapes", "llama-3-8b:8192")),
    Entry(
        "compare-workspace",
        _curve(("gemma-2b:8192", "llama-3-8b:8192", "llama-2-7b:8192"), _BOUNDS),
        ("s2srm-triton",),
    ),
    Entry(
        "compare-small-models",
        (*_VOCABULARY, "--shapes", "gemma-3-270m:8192", "smollm2-135m:8192"),
    ),
    Entry("compare-ignored", (*_VOCABULARY, "--shapes", "gemma-2b:8192", "--ignored", "0.4")),
    Entry("compare-2048", (*_VOCABULARY, "--shapes", "models:2048")),
    Entry("compare-16384", (*_VOCABULARY, "--shapes", "models:16384", "--ignored", "0", "0.4")),
)
_TINY = ("s2srm-cpp", "s2srm-reference", "torch-eager", "torch-padded", "quack")
TINY_PLAN = (
    Entry("compare-tiny", (*_VOCABULARY, "--shapes", "64x32x1000", "--ignored", "0.4"), _TINY),
    Entry("compare-sequences", ("--op", "gae", "token_rewards", "--sequences", "1000/7"), _TINY),
    Entry(
        "compare-workspace",
        _curve(("64x32x1000",), ("0", "200K", "1M"), "--impl", "reference"),
        ("s2srm-reference",),
    ),
)


def compare(steps: Steps, limit_s: float) -> list[Stage]:
    """The plan until the time is up; what is left out is named."""
    dry = steps.runner.dry_run
    end = steps.left_s() - limit_s
    stages: list[Stage] = []
    for entry in TINY_PLAN if dry else PLAN:
        left = steps.left_s() - max(end, 0.0)
        if left < LEAST_S and steps.journal.passed(entry.name) is None:
            detail = f"no time left for {' '.join(entry.arguments)}"
            stages.append(Stage(entry.name, "not run", 0.0, detail))
            print(f"[{entry.name}] not run: {detail}", flush=True)
        else:
            stages.append(_run(steps, entry, left))
    return stages


def _run(steps: Steps, entry: Entry, limit_s: float) -> Stage:
    seconds, rounds = ("0.05", ("2", "3")) if steps.runner.dry_run else ("1", ("5", "50"))
    resume = () if steps.asked_again(entry.name) else ("--resume",)
    command = (
        *(sys.executable, "-m", "benchmarks.compare", *resume, "--device", steps.device),
        *(*entry.arguments, "--providers", *entry.providers),
        *("--seconds", seconds, "--rounds", *rounds),
        *("--budget", f"{max(limit_s - LEAST_S, 1.0):.0f}", "--out", steps.rows),
    )
    # Each provider may end two processes before it is left out.
    attempts = 2 * len(entry.providers) if resume else 1
    return steps.step(entry.name, command, limit_s=limit_s, attempts=attempts)
