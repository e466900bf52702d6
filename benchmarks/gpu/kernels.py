"""The kernels' part of `make gpu`, in under eight minutes, the most telling first.

    smoke       every operation once against float64, first on small shapes; the kernels of each
                model's shape compiled and checked side by side, and csrc built beside them
    ceilings    the machine's matrix rate and bandwidth
    profile     time by kernel, four operations on five models
    sweep       candidates of the kernels' configuration: bits, then time
    compare     every provider that is here, and time against memory over workspace_bytes
    tests       tests/gpu in several processes, then those that need the whole GPU
    counters    of three kernels, by ncu; memcheck and racecheck

Each has a limit of its own and leaves its rows as it goes; what the budget has no room for is
named, and the next run goes on there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu import checks, comparison
from benchmarks.gpu.runner import Stage
from benchmarks.gpu.steps import Steps
from benchmarks.shapes import MODELS

BUDGET_S = 460.0
_SMOKE_S, _CEILINGS_S, _PROFILE_S, _SWEEP_S, _COUNTERS_S = 110.0, 25.0, 50.0, 60.0, 60.0
# For what comes behind the comparison, which could take any time.
_BEHIND_S = 130.0
_SHAPES = tuple(f"{model}:8192" for model in MODELS)
_INTERPRETED = {"TRITON_INTERPRET": "1"}


def smoke(steps: Steps) -> list[Stage]:
    """All processes at once: the time goes into compilers, and on a CPU into the interpreter."""
    if steps.runner.dry_run:
        tiny = ("--shapes", "tiny", "sequences")
        return [
            checks.build(steps),
            steps.program("smoke", *tiny, limit_s=300.0, env=_INTERPRETED),
        ]

    def models(model: str) -> Stage:
        name, shapes = f"smoke-{model}", ("--shapes", f"{model}:2048")
        return steps.program("smoke", *shapes, name=name, limit_s=_SMOKE_S)

    with ThreadPoolExecutor(len(MODELS) + 2) as pool:
        small = pool.submit(
            steps.program, "smoke", "--shapes", "small", name="smoke-small", limit_s=_SMOKE_S
        )
        building = pool.submit(checks.build, steps)
        others = [pool.submit(models, model) for model in MODELS]
        done = [job.result() for job in (small, building, *others)]
    # gae and token_rewards are CUDA C++: they had to be built.
    sequences = ("--shapes", "sequences")
    return [*done, steps.program("smoke", *sequences, name="smoke-sequences", limit_s=_SMOKE_S)]


def ceilings(steps: Steps) -> list[Stage]:
    tiny = ("--tiny",) if steps.runner.dry_run else ()
    return [steps.program("ceilings", *tiny, limit_s=_CEILINGS_S * _patience(steps))]


def profile(steps: Steps) -> list[Stage]:
    arguments = ("--shapes", *_SHAPES)
    if steps.runner.dry_run:
        arguments = ("--shapes", "64x32x500", "--impl", "reference")
    limit_s = _PROFILE_S * _patience(steps)
    return [steps.program("profile", *arguments, limit_s=limit_s)]


def sweep(steps: Steps) -> list[Stage]:
    if steps.runner.dry_run:
        tiny = ("--shapes", "32x16x300", "--ops", "linear_token_stats", "--rounds", "1", "1")
        some = ("--candidates", "group 16", "splits of 1024 columns")
        return [steps.program("sweep", *tiny, *some, limit_s=300.0, env=_INTERPRETED)]
    shapes = ("--shapes", "gemma-2b:8192", "llama-3-8b:8192", "llama-2-7b:8192")
    return [steps.program("sweep", *shapes, limit_s=_SWEEP_S)]


def compare(steps: Steps) -> list[Stage]:
    return comparison.compare(steps, max(steps.left_s() - _BEHIND_S, 0.0))


def counters(steps: Steps) -> list[Stage]:
    if steps.runner.dry_run:
        print("[counters] not run: dry run")
        return [Stage("counters", "not run", 0.0, "dry run"), *checks.sanitize(steps)]
    return [steps.program("counters", limit_s=_COUNTERS_S), *checks.sanitize(steps)]


def _patience(steps: Steps) -> float:
    """A CPU needs longer, and its limits are there to end what hangs."""
    return 6.0 if steps.runner.dry_run else 1.0


STAGES: dict[str, Callable[[Steps], list[Stage]]] = {
    "smoke": smoke,
    "ceilings": ceilings,
    "profile": profile,
    "sweep": sweep,
    "compare": compare,
    "tests": checks.run_tests,
    "counters": counters,
}
"""In this order, whatever subset is asked for."""
# A comparison that missed its limit is a row of the table; that a sweep's or a profile's process
# died fails nothing either.
_CHECKS = ("build", "smoke", "tests", "sanitizer")


def run_all(steps: Steps, wanted: Sequence[str] = tuple(STAGES)) -> tuple[list[Stage], bool]:
    """The stages that are asked for: (how each process ended, whether a check failed)."""
    stages = [stage for name in STAGES if name in wanted for stage in STAGES[name](steps)]
    checked = [stage for stage in stages if stage.name.startswith(_CHECKS)]
    return stages, any(stage.bad for stage in checked)
