"""What the bench_*.py files share: one pytest-benchmark measurement for each provider.

Every provider is checked first, on a few rows of the same head, and skipped with the error if it
fails. Providers of the same call stand in one group, the bare products or the copy among them.
Left out: turns, memory, ignored rows and peers, which `python -m benchmarks.compare` has.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks import checking
from benchmarks.measure import outputs_and_gradients
from benchmarks.problems import Problem, SequenceProblem, normal_problem, sequence_problem
from benchmarks.products import BOTH, copy, modes_of, num_products, products
from benchmarks.providers import providers_named
from benchmarks.providers.base import Provider
from benchmarks.providers.sequences import SEQUENCE_PROVIDERS, TorchPadded, call
from benchmarks.shapes import CPU_SHAPES, SEQUENCE_SHAPES, SequenceShape, Shape, model_shape

_ONE_MILLION = SequenceShape("1m-short", 2**20, 2**11)
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# The first of CPU_SHAPES takes two minutes for each operation: compare has it.
SHAPES = (
    (model_shape("gemma-2b", 8192), model_shape("llama-2-7b", 8192)) if ON_GPU else CPU_SHAPES[1:]
)
LENGTHS = (*SEQUENCE_SHAPES[:2], SEQUENCE_SHAPES[2] if ON_GPU else _ONE_MILLION)
PROVIDERS = ("s2srm-triton", "s2srm-cpp", "s2srm-reference", "torch-eager")
_CHECKED_ROWS = 64
_SECONDS, _ROUNDS = 1.0, (3, 200)


def vocabulary_cases(op: str) -> pytest.MarkDecorator:
    """Parameters `shape`, `mode` and `provider` of a vocabulary operation."""
    cases = [
        pytest.param(shape, mode, provider, id=f"{shape.name}-{mode}-{provider}")
        for shape in SHAPES
        for mode in modes_of(op)
        for provider in ("products", *PROVIDERS)
    ]
    return pytest.mark.parametrize(("shape", "mode", "provider"), cases)


def sequence_cases() -> pytest.MarkDecorator:
    """Parameters `shape` and `provider` of a sequence operation."""
    names = ("copy", *(provider.name for provider in SEQUENCE_PROVIDERS))
    cases = [
        pytest.param(shape, name, id=f"{shape.name}-{name}") for shape in LENGTHS for name in names
    ]
    return pytest.mark.parametrize(("shape", "provider"), cases)


def time_vocabulary(benchmark: Any, op: str, shape: Shape, mode: str, name: str) -> None:
    """Time one provider's call; skip with the reason where it has none or is wrong."""
    benchmark.group = f"{op}, {mode}, {shape.name}"
    problem = _problem(shape)
    if name == "products":
        time_call(benchmark, products(problem, num_products(op, mode)))
        return
    (provider,) = providers_named([name])
    backward = mode == BOTH
    reason = provider.missing(DEVICE) or provider.refuses(op, problem, backward)
    if reason is not None:
        pytest.skip(reason)
    _check(provider, op, shape, backward)
    run = provider.build(op, problem)
    time_call(benchmark, lambda: outputs_and_gradients(run, problem, backward, checked=False))


def time_sequences(benchmark: Any, op: str, shape: SequenceShape, name: str) -> None:
    """The same for gae and token_rewards."""
    benchmark.group = f"{op}, {shape.name}"
    problem = _sequences(shape)
    if name == "copy":
        time_call(benchmark, copy(op, problem))
        return
    (provider,) = (p for p in SEQUENCE_PROVIDERS if p.name == name)
    reason = provider.refuses(op, problem)
    if reason is not None:
        pytest.skip(reason)
    run = provider.build(op, problem)
    exact = call(op, "reference", problem, problem.rewards.double(), problem.values.double())
    made = run()
    made = provider.packed(made, problem) if isinstance(provider, TorchPadded) else made
    errors = [checking.relative_error(m, e) for m, e in zip(made, exact, strict=True)]
    assert max(errors) < 1e-6, errors
    time_call(benchmark, run)


def _check(provider: Provider, op: str, shape: Shape, backward: bool) -> None:
    problem = _problem(dataclasses.replace(shape, num_rows=_CHECKED_ROWS))
    truth = checking.find_truth(op, problem, provider.outputs(op), backward)
    made = outputs_and_gradients(provider.build(op, problem), problem, backward)
    errors = checking.compare(op, problem, truth.exact, *made)
    assert checking.within(errors, truth, DTYPE), (errors, truth.eager_errors)


def time_call(benchmark: Any, function: Callable[[], object]) -> None:
    """Time function(), to the end of its work on a GPU."""

    def finished() -> None:
        function()
        if ON_GPU:
            torch.cuda.synchronize(DEVICE)

    finished()
    start = time.perf_counter()
    finished()
    rounds = int(_SECONDS / (time.perf_counter() - start))
    rounds = min(max(rounds, _ROUNDS[0]), _ROUNDS[1])
    benchmark.pedantic(finished, rounds=rounds, iterations=1)


# Two: the problem that is timed and the small one that is checked.
@lru_cache(maxsize=2)
def _problem(shape: Shape) -> Problem:
    return normal_problem(shape, DTYPE, DEVICE)


@lru_cache(maxsize=1)
def _sequences(shape: SequenceShape) -> SequenceProblem:
    return sequence_problem(shape, DEVICE)
