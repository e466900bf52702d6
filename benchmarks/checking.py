"""The one rule: an error against float64 of at most twice the error of eager PyTorch.

Errors are relative: the norm of the difference over the norm of the truth, over live rows. Eager
PyTorch runs on the same tensors in their dtype. Two outputs need a word: an argmax is as wrong as
the logit that it gives away, and the error of a mean loss is taken without letting the rows' errors
cancel, so that no one is held to eager's luck.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.definitions import SCALAR_OPS, Evaluation, evaluate
from benchmarks.problems import Problem

FACTOR = 2.0


@dataclass(frozen=True)
class Truth:
    """Float64 values and gradients of some outputs, and the errors that eager makes in them."""

    exact: Evaluation
    eager_errors: dict[str, float]


def find_truth(op: str, problem: Problem, names: tuple[str, ...], gradients: bool) -> Truth:
    """The two evaluations that everyone is compared with."""
    exact = evaluate(op, problem, names, torch.float64, gradients)
    eager = evaluate(op, problem, names, problem.hidden.dtype, gradients)
    errors = compare(op, problem, exact, eager.outputs, eager.gradients)
    if exact.row_losses is not None and eager.row_losses is not None:
        difference = (eager.row_losses.double() - exact.row_losses).abs().sum()
        errors["loss"] = _ratio(difference, exact.row_losses.sum().abs())
    return Truth(exact, errors)


def compare(
    op: str,
    problem: Problem,
    exact: Evaluation,
    outputs: dict[str, Tensor],
    gradients: dict[str, Tensor],
) -> dict[str, float]:
    """Relative error of every output and, as `d_hidden` etc., of every gradient; inf for NaN."""
    errors: dict[str, float] = {}
    for name, output in outputs.items():
        truth = exact.outputs[name]
        if name == "argmax":
            errors[name] = _argmax_error(problem, exact, output)
        elif op in SCALAR_OPS:
            errors[name] = relative_error(output, truth)
        else:
            errors[name] = relative_error(output[problem.live], truth[problem.live])
    for name, gradient in gradients.items():
        errors[f"d_{name}"] = relative_error(gradient, exact.gradients[name])
    return errors


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in the Euclidean norm; inf where the value is not finite."""
    if value.shape != truth.shape:
        return math.inf
    # In pieces: a float64 copy of a weight's gradient is large.
    value, truth = torch.atleast_1d(value), torch.atleast_1d(truth)
    squares = torch.zeros(2, dtype=torch.float64, device=value.device)
    for made, right in zip(value.split(2**14), truth.split(2**14), strict=True):
        difference = made.double() - right.double()
        squares += torch.stack([difference.square().sum(), right.double().square().sum()])
    return _ratio(*squares.sqrt().unbind())


def within(errors: dict[str, float], truth: Truth, dtype: torch.dtype) -> bool:
    """Whether every error keeps the rule."""
    return all(
        error <= limit(name, truth.eager_errors[name], dtype) for name, error in errors.items()
    )


def limit(name: str, eager_error: float, dtype: torch.dtype) -> float:
    """Twice eager's, and one rounding in the statistics' dtype, where eager happens to be exact.

    A scalar has four: it is rounded in the sum, the quotient and the factors before them, and there
    is no other element that would make up for it.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return FACTOR * eager_error + (4 if name == "loss" else 1) * torch.finfo(wide).eps


def _argmax_error(problem: Problem, exact: Evaluation, argmax: Tensor) -> float:
    ids = argmax[problem.live]
    if bool(((ids < 0) | (ids >= problem.shape.vocab_size)).any()):
        return math.inf
    logits = torch.cat(
        [
            _logits_at(problem, rows, chosen)
            for rows, chosen in zip(problem.live.split(2**12), ids.split(2**12), strict=True)
        ]
    )
    return relative_error(logits, exact.outputs["max_logit"][problem.live])


def _logits_at(problem: Problem, rows: Tensor, ids: Tensor) -> Tensor:
    """(n,) float64 logits of one chosen column for each row."""
    with torch.no_grad():
        hidden = problem.hidden[rows].double()
        z = (hidden * problem.weight[ids].double()).sum(dim=-1)
        if problem.bias is not None:
            z = z + problem.bias[ids].double()
        if problem.softcap is not None:
            z = problem.softcap * torch.tanh(z / problem.softcap)
        return z / problem.temperature


def _ratio(error: Tensor, size: Tensor) -> float:
    """error / size, 0 for 0/0, inf for anything that is not a number."""
    top, bottom = float(error), float(size)
    if not (math.isfinite(top) and math.isfinite(bottom)):
        return math.inf
    if bottom == 0:
        return 0.0 if top == 0 else math.inf
    return top / bottom
