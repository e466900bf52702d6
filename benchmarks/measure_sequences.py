"""Check, then time: gae or token_rewards on one problem, against a copy of as many bytes.

The truth is the reference backend in float64, and its float32 run stands for eager; tests/kernels
and tests/gpu hold the reference to loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import checking
from benchmarks.measure import ANCHOR, MIB, Session, timing_fields
from benchmarks.problems import SequenceProblem
from benchmarks.products import BYTES_PER_TOKEN, FORWARD, copy
from benchmarks.providers.sequences import SEQUENCE_PROVIDERS, TorchPadded, call
from benchmarks.rows import Row
from benchmarks.timing import kernel_ms, peak_extra_bytes, time_in_turns

OUTPUTS = {"gae": ("advantages", "returns"), "token_rewards": ("rewards", "divergence_index")}


def measure_sequences(session: Session, op: str, problem: SequenceProblem) -> list[Row]:
    """Rows of every provider; nothing is timed that failed its check."""
    exact = call(op, "reference", problem, problem.rewards.double(), problem.values.double())
    eager = call(op, "reference", problem, problem.rewards, problem.values)
    eager_errors = _errors(op, eager, exact)
    fields: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for provider in SEQUENCE_PROVIDERS:
        if session.named is not None and provider.name not in session.named:
            continue
        reason = provider.refuses(op, problem)
        fields[provider.name] = {"reason": reason, "version": provider.version()}
        if reason is not None:
            continue
        run = provider.build(op, problem)
        made = run()
        packed = provider.packed(made, problem) if isinstance(provider, TorchPadded) else made
        errors = _errors(op, packed, exact)
        limits = {n: checking.limit(n, e, torch.float32) for n, e in eager_errors.items()}
        passed = all(error <= limits[name] for name, error in errors.items())
        fields[provider.name] |= {
            "errors": errors,
            "eager_errors": eager_errors,
            "passed": passed,
            "result_mib": sum(t.nbytes for t in made) / MIB,
            "reason": None if passed else "an error is more than twice the reference's in float32",
        }
        if passed:
            calls[provider.name] = run
    _time(session, op, problem, calls, fields)
    return [
        session.write(
            op=op,
            provider=name,
            outputs=list(OUTPUTS[op]),
            shape=problem.shape.name,
            num_rows=problem.shape.num_rows,
            num_sequences=problem.shape.num_sequences,
            dtype="float32",
            ignored=0.0,
            mode=FORWARD,
            inputs="normal",
            **found,
        )
        for name, found in fields.items()
    ]


def _errors(op: str, made: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> dict[str, float]:
    pairs = zip(OUTPUTS[op], made, exact, strict=True)
    return {name: checking.relative_error(value, truth) for name, value, truth in pairs}


def _time(
    session: Session,
    op: str,
    problem: SequenceProblem,
    calls: dict[str, Callable[[], object]],
    fields: dict[str, dict[str, Any]],
) -> None:
    """Adds to the fields of every provider in `calls`."""
    turns = {ANCHOR: copy(op, problem), **calls}
    times = time_in_turns(turns, session.device, session.seconds, session.rounds)
    for name, run in calls.items():
        fields[name] |= timing_fields(times[name], times[ANCHOR])
        rate = BYTES_PER_TOKEN[op] * problem.shape.num_rows / (fields[name]["p50_ms"] * 1e-3)
        fields[name] |= {
            "anchor": "copy",
            "gb_per_s": rate * 1e-9,
            "kernel_ms": kernel_ms(run, session.device),
            "peak_extra_mib": peak_extra_bytes(run, session.device) / MIB,
        }
