"""What the files of a run must hold for the page, checked where they are read.

A shape is a type, a set of values, None, a list [shape], a dict (REST for every other key), or a
tuple of alternatives. Keys that a shape does not name may be there.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

from s2srm.config import RewardKind
from s2srm.errors import UserError

REST = object()
"""Stands in a dict shape for every key that it does not name."""
_NUMBER = "a number"
_INTERVAL = ({"mean": _NUMBER, "low": _NUMBER, "high": _NUMBER}, None)
_COLUMNS = ("score", "agreement", "refusal", "safety", "length", "over_needed", "finished")

EVALUATION = {
    "judge": str,
    "against": [str],
    "groups": [
        {
            "split": {"test", "ood"},
            "temperature": _NUMBER,
            "num_prompts": int,
            "policies": {
                REST: {**dict.fromkeys(_COLUMNS, _INTERVAL), "win_rate": {REST: _INTERVAL}}
            },
        }
    ],
}
METRICS_ROW = {"step": _NUMBER, REST: (_NUMBER, None)}
FEEDBACK_ROW = {
    "prompt": str,
    "tokens": [str],
    "rewards": [_NUMBER],
    "rm_tokens": ([str], None),
    "divergence_index": (int, None),
    "correction": (str, None),
    "finished": bool,
    "sum": _NUMBER,
    "gold": (_NUMBER, None),
}
PPO_CONFIG = {
    "data": {"path": str},
    "reward": {"kind": set(get_args(RewardKind)), "model": {"path": str}},
}
SUPERVISED_CONFIG = {"data": {"path": str}, "model": {"path": str}}


def check(value: Any, shape: Any, where: str) -> None:
    """UserError that names the file, the place in it, and what should stand there."""
    fault = _fault(value, shape, "")
    if fault is not None:
        raise UserError(f"{where}: {fault}; the file was not written by this version of s2srm")


def check_feedback(row: Any, path: Path, number: int) -> None:
    """A row of samples.jsonl or feedback.jsonl, whose lists go together token by token."""
    where = f"{path}:{number}"
    check(row, FEEDBACK_ROW, where)
    check(row.get("correction_tokens"), ([str], None), f"{where}: correction_tokens")
    check(row.get("gold_correction"), (_NUMBER, None), f"{where}: gold_correction")
    written = row["rm_tokens"] or row["tokens"]
    if not len(row["tokens"]) == len(row["rewards"]) == len(written):
        raise UserError(f"{where}: tokens, rewards and rm_tokens are not equally many")


def _fault(value: Any, shape: Any, key: str) -> str | None:
    """Where and how the value departs from the shape, or None."""
    if isinstance(shape, tuple):
        faults = [_fault(value, option, key) for option in shape]
        return None if None in faults else faults[0]
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return _expected("keys and values", value, key)
        missing = next((k for k in shape if k is not REST and k not in value), None)
        if missing is not None:
            return f"{f'{key}.{missing}'.lstrip('.')} is missing"
        named = {k: shape.get(k, shape.get(REST)) for k in value if k in shape or REST in shape}
        return _first(_fault(value[k], inner, f"{key}.{k}") for k, inner in named.items())
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _expected("a list", value, key)
        return _first(_fault(item, shape[0], f"{key}[{i}]") for i, item in enumerate(value))
    if isinstance(shape, set):
        fits = isinstance(value, str) and value in shape
        return None if fits else _expected(" or ".join(sorted(shape)), value, key)
    if shape == _NUMBER:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if is_number and math.isfinite(value) else _expected(_NUMBER, value, key)
    if shape is None:
        return None if value is None else _expected("null", value, key)
    return None if isinstance(value, shape) else _expected(shape.__name__, value, key)


def _first(faults: Any) -> str | None:
    return next((fault for fault in faults if fault is not None), None)


def _expected(what: str, value: Any, key: str) -> str:
    return f"{key.lstrip('.') or 'it'}: expected {what}, got {value!r:.60}"
