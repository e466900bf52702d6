"""The numeric options of an operation, as one tensor that its operators take.

A float in an operator's schema is a constant of the graph that torch.compile makes: a schedule
(`temperature=2 * s`) compiles anew at every step until the limit, and Inductor was seen to keep an
old value. A tensor is data. It lies on the CPU, where reading it costs no synchronisation, in
float64, which holds every Python float.

Checked at the call, and again inside the vocabulary operations for the tensors of a compiled call,
whose values nobody knows before. Left out: options whose value decides a shape or a branch of the
graph (strings, counts, `None`); those are arguments of the operators.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import functools
import math
import numbers
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

Number = float | Tensor
"""A number (of Python or NumPy), or a 0-d tensor. A tensor on a GPU is waited for."""

_LARGEST = torch.finfo(torch.float32).max


class _Range(NamedTuple):
    low: float = -_LARGEST
    high: float = _LARGEST
    above: bool = False  # low itself lies outside


# What logits are divided by, and what they are bounded by: with anything beyond, float32 logits
# vanish, overflow or lose their slope.
_SCALE = _Range(1e-18, 1e18)
_NOT_NEGATIVE = _Range(0.0)
_FRACTION = _Range(0.0, 1.0)
_RANGES = {
    "temperature": _SCALE,
    "softcap": _SCALE,
    "normalizer": _SCALE,
    "label_smoothing": _FRACTION,
    "z_loss": _NOT_NEGATIVE,
    "skip_mass": _FRACTION,
    "clip_low": _NOT_NEGATIVE,
    "clip_high": _NOT_NEGATIVE,
    "dual_clip": _Range(1.0, above=True),
    "kl_coef": _NOT_NEGATIVE,
    "entropy_coef": _Range(),
    # e^80 is the largest ratio whose product with a count and an advantage is safe in float32.
    "max_log_ratio": _Range(1e-18, 80.0),
    "gamma": _FRACTION,
    "lam": _FRACTION,
    "max_margin": _NOT_NEGATIVE,
    "positive": _NOT_NEGATIVE,
    "negative": _NOT_NEGATIVE,
    "match": _Range(),
}
_MAY_BE_NONE = ("softcap", "max_log_ratio", "clip_low", "clip_high", "dual_clip")
_NONE = math.inf  # no bound is one at infinity


def check_option(name: str, value: float) -> None:
    """ValueError unless `value` lies in the range of the option `name`."""
    low, high, above = _RANGES[name]
    # Comparisons alone: torch.compile may hand over a symbolic number. NaN fails every one of them.
    if not low <= value <= high or (above and value == low):
        bracket = "(" if above else "["
        raise ValueError(f"{name} must be a number in {bracket}{low:g}, {high:g}], got {value}")


def pack_options(**options: Number | None) -> Tensor:
    """(k,) float64 on the CPU, in the order of the keywords; ValueError for a bad one."""
    values: list[Number] = [_number(name, value) for name, value in options.items()]
    if torch.compiler.is_compiling():
        # A product with a tensor is what keeps a traced number symbolic in every backend.
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return torch.stack([v.to(one) if isinstance(v, Tensor) else one * v for v in values])
    if torch._C._len_torch_dispatch_stack():  # pyright: ignore[reportPrivateUsage]
        return _tensor(*values)  # a mode that makes tensors of its own kind
    return _kept(*values)


def unpack_options(options: Tensor, *names: str) -> list[float]:
    """The values under the first `names`, checked; None comes back as infinity."""
    values: list[float] = options[: len(names)].tolist()
    for name, value in zip(names, values, strict=True):
        if value != _NONE or name not in _MAY_BE_NONE:
            check_option(name, value)
    return values


def may_be_nonzero(value: Number) -> bool:
    """False where the call itself says that the option is 0."""
    known = isinstance(value, int | float) or not torch.compiler.is_compiling()
    return isinstance(value, Tensor) or not known or bool(value != 0)


def _tensor(*values: Number) -> Tensor:
    # Saved for backward although it may have been made in inference mode: calls share it.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float64, device="cpu")


# Making a tensor takes as long as a small operation; nobody writes to it.
_kept = functools.lru_cache(maxsize=64)(_tensor)


def _number(name: str, value: Any) -> Number:
    """The value, checked; a tensor's only where torch.compile does not trace."""
    if type(value) is float:  # nearly always
        check_option(name, value)
        return value
    if value is None:
        if name in _MAY_BE_NONE:
            return _NONE
        raise ValueError(f"{name} must be a number or a 0-d tensor, got None")
    compiling = torch.compiler.is_compiling()
    if compiling and not isinstance(value, int | float | Tensor):
        value = torch.as_tensor(value)  # a number of NumPy, which the compiler takes for an array
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex():
            raise ValueError(f"{name} must be a number or 0-d, got shape {tuple(value.shape)}")
        if value.requires_grad:
            raise ValueError(f"{name} requires a gradient but is a constant here: detach it")
    elif not compiling and not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number or a 0-d tensor, got {value!r}")
    number = cast(Number, value) if compiling else _as_float(value)
    if not isinstance(number, Tensor):
        check_option(name, number)
    return number


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # of an int: beyond every range
        return math.inf
