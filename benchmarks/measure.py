"""Check, then time: one operation on one problem with all its providers."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import checking
from benchmarks.problems import Problem, SequenceProblem
from benchmarks.products import (
    BOTH,
    BYTES_PER_TOKEN,
    FORWARD,
    copy,
    modes_of,
    num_products,
    product_flops,
    products,
)
from benchmarks.providers.base import Provider, Run
from benchmarks.providers.sequences import SEQUENCE_PROVIDERS, TorchPadded, call
from benchmarks.rows import Row, append_row
from benchmarks.timing import kernel_ms, peak_extra_bytes, quantiles, time_in_turns

_ANCHOR = "anchor"
_MIB = 2**20


@dataclass
class Session:
    """What all measurements of one run share. named: the providers asked for, None for all."""

    device: torch.device
    dtype: torch.dtype
    providers: Sequence[Provider]
    named: Sequence[str] | None
    environment: Mapping[str, Any]
    out: Path
    seconds: float
    rounds: tuple[int, int]
    deadline: float

    def time_left_s(self) -> float:
        return self.deadline - time.monotonic()

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
    result_mib: float | None = None


def measure_vocabulary(
    session: Session, op: str, problem: Problem, ignored: float, modes: Sequence[str]
) -> list[Row]:
    """Rows of every provider for each mode. Nothing is timed that failed its check."""
    checked = _check_all(session, op, problem, backward=BOTH in modes_of(op))
    rows: list[Row] = []
    for mode in modes:
        ready = {name: c.run for name, c in checked.items() if c.run is not None}
        calls = {name: _call(run, problem, mode) for name, run in ready.items()}
        count = num_products(op, mode)
        times: dict[str, list[float]] = {}
        if calls:
            anchor = {_ANCHOR: products(problem, count)}
            times = time_in_turns(
                {**anchor, **calls}, session.device, session.seconds, session.rounds
            )
            # Its logits are as large as eager's: they go before any memory is measured.
            del anchor
        for provider in session.providers:
            found = checked[provider.name]
            fields = _vocabulary_fields(session, op, problem, ignored, mode)
            fields |= {
                "provider": provider.name,
                "version": _version(provider, session.device),
                "outputs": list(found.outputs),
                "errors": found.errors,
                "eager_errors": found.eager_errors,
                "passed": found.passed,
                "reason": found.reason,
            }
            if provider.name in calls:
                fields |= _times(times[provider.name], times[_ANCHOR])
                peak = peak_extra_bytes(calls[provider.name], session.device)
                done = product_flops(problem, count) / (fields["p50_ms"] * 1e-3)
                fields |= {
                    "anchor": f"{count} products" if count > 1 else "1 product",
                    "tflops": done * 1e-12,
                    "peak_extra_mib": peak / _MIB,
                }
                if mode == BOTH:
                    fields["result_mib"] = found.result_mib
            rows.append(session.write(**fields))
    return rows


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
        "dtype": str(session.dtype).removeprefix("torch."),
        "ignored": ignored,
        "mode": mode,
        "inputs": problem.kind,
    }


def _check_all(session: Session, op: str, problem: Problem, backward: bool) -> dict[str, _Checked]:
    truths: dict[tuple[str, ...], checking.Truth] = {}
    found: dict[str, _Checked] = {}
    for provider in session.providers:
        names = provider.outputs(op)
        reason = provider.missing(session.device) or provider.refuses(op, problem, backward)
        if reason is not None:
            found[provider.name] = _Checked(None, names, reason, {}, {}, None)
            continue
        if names not in truths:
            truths[names] = checking.find_truth(op, problem, names, backward)
        found[provider.name] = _check(provider, op, problem, truths[names], backward)
        _free(session.device)
    return found


def _check(
    provider: Provider, op: str, problem: Problem, truth: checking.Truth, backward: bool
) -> _Checked:
    names = provider.outputs(op)
    # Someone else's kernel may fail in any way; the row says how, and the others go on.
    try:
        run = provider.build(op, problem)
        outputs, gradients = _outputs_and_gradients(run, problem, backward)
        errors = checking.compare(op, problem, truth.exact, outputs, gradients)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
        return _Checked(None, names, reason, {}, {}, False)
    eager_errors = {name: truth.eager_errors[name] for name in errors}
    results = sum(t.nbytes for t in (*outputs.values(), *gradients.values())) / _MIB
    if checking.within(errors, truth, problem.hidden.dtype):
        return _Checked(run, names, None, errors, eager_errors, True, results)
    return _Checked(None, names, "an error is more than twice eager's", errors, eager_errors, False)


def _outputs_and_gradients(
    run: Run, problem: Problem, backward: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if not backward:
        with torch.no_grad():
            return run(), {}
    outputs = run()
    inputs = problem.inputs
    upstream = [problem.upstream(name).to(out.dtype) for name, out in outputs.items()]
    grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), upstream)
    return (
        {name: output.detach() for name, output in outputs.items()},
        dict(zip(inputs, grads, strict=True)),
    )


def _call(run: Run, problem: Problem, mode: str) -> Callable[[], object]:
    return lambda: _outputs_and_gradients(run, problem, backward=mode == BOTH)


def measure_sequences(session: Session, op: str, problem: SequenceProblem) -> list[Row]:
    """Rows of every provider of gae or token_rewards, against a copy of as many bytes."""
    exact = call(op, "reference", problem, problem.rewards.double(), problem.values.double())
    eager = call(op, "reference", problem, problem.rewards, problem.values)
    names = ("advantages", "returns") if op == "gae" else ("rewards", "divergence_index")

    def errors_of(made: tuple[Tensor, Tensor]) -> dict[str, float]:
        pairs = zip(names, made, exact, strict=True)
        return {name: checking.relative_error(m, e) for name, m, e in pairs}

    eager_errors = errors_of(eager)
    providers = [p for p in SEQUENCE_PROVIDERS if session.named is None or p.name in session.named]
    fields: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for provider in providers:
        reason = provider.refuses(op, problem)
        fields[provider.name] = {"reason": reason, "version": provider.version()}
        if reason is not None:
            continue
        run = provider.build(op, problem)
        made = run()
        packed = provider.packed(made, problem) if isinstance(provider, TorchPadded) else made
        errors = errors_of(packed)
        limits = {n: checking.limit(e, torch.float32) for n, e in eager_errors.items()}
        passed = all(error <= limits[name] for name, error in errors.items())
        fields[provider.name] |= {
            "errors": errors,
            "eager_errors": eager_errors,
            "passed": passed,
            "result_mib": sum(t.nbytes for t in made) / _MIB,
            "reason": None if passed else "an error is more than twice the reference's in float32",
        }
        if passed:
            calls[provider.name] = run
    times: dict[str, list[float]] = {}
    if calls:
        turns = {_ANCHOR: copy(op, problem), **calls}
        times = time_in_turns(turns, session.device, session.seconds, session.rounds)
    for name, run in calls.items():
        fields[name] |= _times(times[name], times[_ANCHOR])
        rate = BYTES_PER_TOKEN[op] * problem.shape.num_rows / (fields[name]["p50_ms"] * 1e-3)
        fields[name] |= {
            "anchor": "copy",
            "gb_per_s": rate * 1e-9,
            "kernel_ms": kernel_ms(run, session.device),
            "peak_extra_mib": peak_extra_bytes(run, session.device) / _MIB,
        }
    return [
        session.write(
            op=op,
            provider=name,
            outputs=list(names),
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


def _times(values: Sequence[float], anchor: Sequence[float]) -> dict[str, Any]:
    p20, p50, p80 = quantiles(values)
    ratio = statistics.median(v / a for v, a in zip(values, anchor, strict=True))
    return {
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "rounds": len(values),
        "anchor_ms": statistics.median(anchor),
        "ratio": ratio,
        "share": 1 / ratio,
    }


def _version(provider: Provider, device: torch.device) -> str:
    return provider.version() if provider.missing(device) is None else ""


def _free(device: torch.device) -> None:
    gc.collect()
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
