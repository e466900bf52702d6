"""Check, then time: one vocabulary operation on one problem with all its providers."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import checking
from benchmarks.cases import is_context_lost
from benchmarks.problems import Problem
from benchmarks.products import (
    BOTH,
    modes_of,
    num_products,
    product_flops,
    products,
)
from benchmarks.providers.base import Provider, Run
from benchmarks.resuming import LOST, Call, Progress, call_of
from benchmarks.rows import Row, append_row
from benchmarks.timing import peak_extra_bytes, quantiles, time_in_turns

ANCHOR = "anchor"
MIB = 2**20


class ContextLost(RuntimeError):
    """A kernel ended the CUDA context of this process; the arguments: its provider, the reason."""


@dataclass
class Session:
    """What all measurements of one run share.

    named: the providers asked for, None for all. progress: what the file has already, None where
    everything is measured.
    """

    device: torch.device
    dtype: torch.dtype
    providers: Sequence[Provider]
    named: Sequence[str] | None
    environment: Mapping[str, Any]
    out: Path
    seconds: float
    rounds: tuple[int, int]
    deadline: float
    progress: Progress | None = None

    def time_left_s(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def process(self) -> str:
        """What tells this run from others that write into the file."""
        return f"{os.getpid()} {self.deadline}"

    def write(self, **fields: Any) -> Row:
        row = Row(**self.environment, **fields)
        append_row(self.out, row)
        print(_line(row), flush=True)
        return row


@dataclass(frozen=True)
class _Checked:
    """Errors of one provider; run is None where it cannot be timed, and reason says why."""

    run: Run | None
    outputs: tuple[str, ...]
    reason: str | None
    errors: dict[str, float]
    eager_errors: dict[str, float]
    passed: bool | None
    version: str = ""
    result_mib: float | None = None


def measure_vocabulary(
    session: Session, op: str, problem: Problem, ignored: float, modes: Sequence[str]
) -> list[Row]:
    """Rows of every provider for each mode. Nothing is timed that failed its check."""
    call = call_of(op, problem.shape.name, ignored, dtype_name(session.dtype))
    try:
        rows = _measure(session, op, problem, ignored, modes, call)
    except ContextLost as lost:
        # Its row says so; the others get theirs from the process that goes on.
        for mode in modes:
            fields = _vocabulary_fields(session, op, problem, ignored, mode)
            reason = f"{LOST}{lost.args[1]}"
            session.write(**fields, provider=lost.args[0], version="", passed=False, reason=reason)
        if session.progress is not None:
            session.progress.end(call, session.process)
        raise
    if session.progress is not None:
        session.progress.end(call, session.process)
    return rows


def _measure(
    session: Session, op: str, problem: Problem, ignored: float, modes: Sequence[str], asked: Call
) -> list[Row]:
    checked = _check_all(session, op, problem, asked)
    if session.progress is not None:
        session.progress.begin(asked, "", session.process)
    rows: list[Row] = []
    for mode in modes:
        count = num_products(op, mode)
        anchor = products(problem, count)
        calls, failures = _warm(checked, problem, mode)
        turns = {ANCHOR: anchor, **calls}
        times = time_in_turns(turns, session.device, session.seconds, session.rounds)
        # The anchor's logits are as large as eager's: they go before any memory is measured.
        del anchor, turns
        for provider in session.providers:
            found = checked[provider.name]
            fields = _vocabulary_fields(session, op, problem, ignored, mode)
            fields |= {
                "provider": provider.name,
                "version": found.version,
                "workspace_bytes": getattr(provider, "workspace_bytes", None),
                "outputs": list(found.outputs),
                "errors": found.errors,
                "eager_errors": found.eager_errors,
                "passed": found.passed,
                "reason": found.reason or failures.get(provider.name),
            }
            if provider.name in calls:
                fields |= timing_fields(times[provider.name], times[ANCHOR])
                peak = peak_extra_bytes(calls[provider.name], session.device)
                done = product_flops(problem, count) / (fields["p50_ms"] * 1e-3)
                fields |= {
                    "anchor": f"{count} products" if count > 1 else "1 product",
                    "tflops": done * 1e-12,
                    "peak_extra_mib": peak / MIB,
                }
                if mode == BOTH:
                    fields["result_mib"] = found.result_mib
            rows.append(session.write(**fields))
    return rows


def _warm(
    checked: Mapping[str, _Checked], problem: Problem, mode: str
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Calls that run beside the anchor's buffers, and why the others do not: no memory left."""
    calls: dict[str, Callable[[], object]] = {}
    failures: dict[str, str] = {}
    for name, found in checked.items():
        if found.run is None:
            continue
        call = _call(found.run, problem, mode)
        try:
            call()
            if problem.device.type == "cuda":
                torch.cuda.synchronize(problem.device)
        except Exception as error:
            failures[name] = _describe(error, name)
        else:
            calls[name] = call
        _free(problem.device)
    return calls, failures


def _vocabulary_fields(
    session: Session, op: str, problem: Problem, ignored: float, mode: str
) -> dict[str, Any]:
    return {
        "op": op,
        "shape": problem.shape.name,
        "num_rows": problem.shape.num_rows,
        "num_live": problem.num_live,
        "hidden_size": problem.shape.hidden_size,
        "vocab_size": problem.shape.vocab_size,
        "dtype": dtype_name(session.dtype),
        "ignored": ignored,
        "mode": mode,
        "inputs": problem.kind,
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_all(session: Session, op: str, problem: Problem, asked: Call) -> dict[str, _Checked]:
    backward = BOTH in modes_of(op)
    truths: dict[tuple[str, ...], checking.Truth] = {}
    found: dict[str, _Checked] = {}
    for provider in session.providers:
        names = provider.outputs(op)
        progress = session.progress
        reason = None if progress is None else progress.obstacle(asked, provider.name)
        reason = reason or _obstacle(provider, op, problem, backward)
        if reason is not None:
            found[provider.name] = _Checked(None, names, reason, {}, {}, None)
            continue
        if names not in truths:
            truths[names] = checking.find_truth(op, problem, names, backward)
        if progress is not None:
            progress.begin(asked, provider.name, session.process)
        found[provider.name] = _check(provider, op, problem, truths[names], backward)
        _free(session.device)
    return found


def _obstacle(provider: Provider, op: str, problem: Problem, backward: bool) -> str | None:
    # A package that is half installed fails at the question already.
    try:
        return provider.missing(problem.device) or provider.refuses(op, problem, backward)
    except Exception as error:
        return _describe(error, provider.name)


def _describe(error: Exception, provider: str) -> str:
    """One line for a row. ContextLost for an error after which nothing runs in this process."""
    line = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
    if is_context_lost(error):
        raise ContextLost(provider, line) from error
    return line


def _check(
    provider: Provider, op: str, problem: Problem, truth: checking.Truth, backward: bool
) -> _Checked:
    names = provider.outputs(op)
    version = ""
    # Someone else's kernel may fail in any way; the row says how, and the others go on.
    try:
        version = provider.version()
        run = provider.build(op, problem)
        outputs, gradients = outputs_and_gradients(run, problem, backward)
        errors = checking.compare(op, problem, truth.exact, outputs, gradients)
    except Exception as error:
        reason = _describe(error, provider.name)
        return _Checked(None, names, reason, {}, {}, False, version)
    eager_errors = {name: truth.eager_errors[name] for name in errors}
    results = sum(t.nbytes for t in (*outputs.values(), *gradients.values())) / MIB
    if checking.within(errors, truth, problem.hidden.dtype):
        return _Checked(run, names, None, errors, eager_errors, True, version, results)
    reason = "an error is more than twice eager's"
    return _Checked(None, names, reason, errors, eager_errors, False, version)


def outputs_and_gradients(
    run: Run, problem: Problem, backward: bool, checked: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the call gives, and with `backward` the gradients of <upstream, outputs> by input.

    The upstream gradient of a loss is random where the result is checked, and 1 where it is timed,
    as in loss.backward().
    """
    if not backward:
        with torch.no_grad():
            return run(), {}
    outputs = run()
    inputs = problem.inputs
    upstream = [
        problem.upstream(name).to(output.dtype)
        if checked or output.dim()
        else torch.ones_like(output)
        for name, output in outputs.items()
    ]
    grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), upstream)
    return (
        {name: output.detach() for name, output in outputs.items()},
        dict(zip(inputs, grads, strict=True)),
    )


def _call(run: Run, problem: Problem, mode: str) -> Callable[[], object]:
    return lambda: outputs_and_gradients(run, problem, backward=mode == BOTH, checked=False)


def timing_fields(values: Sequence[float], anchor: Sequence[float]) -> dict[str, Any]:
    """The row's fields about times: quantiles, and the ratio to the anchor round by round.

    The anchor has at least as many rounds; the first ones are those of the values.
    """
    p20, p50, p80 = quantiles(values)
    ratio = statistics.median(v / a for v, a in zip(values, anchor, strict=False))
    return {
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "rounds": len(values),
        "anchor_ms": statistics.median(anchor[: len(values)]),
        "ratio": ratio,
        "share": 1 / ratio,
    }


def _free(device: torch.device) -> None:
    gc.collect(1)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _line(row: Row) -> str:
    start = f"  {row.mode:16} {row.provider:24}"
    if row.p50_ms is None:
        return f"{start} no time: {row.reason}"
    rate = f"{row.gb_per_s:.0f} GB/s" if row.gb_per_s else f"{row.tflops:.3g} TFLOP/s"
    return (
        f"{start} {row.p50_ms:10.3f} ms  {row.ratio:6.2f} x {row.anchor:10}  {rate:16}"
        f" {row.peak_extra_mib:9.1f} MiB"
    )
