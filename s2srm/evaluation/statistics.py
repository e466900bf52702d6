"""Means over prompts with bootstrap intervals, and paired win rates.

The prompt is the unit: several responses to one prompt are averaged first, because they are not
independent. Win rates compare responses to the same prompt, so that the prompts' own difficulty
cancels. Left out: intervals over training seeds, which one run of each method cannot give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BOOTSTRAP_SEED = 20240901


@dataclass(frozen=True)
class Interval:
    """A mean over n prompts and its 95% confidence interval [low, high]."""

    mean: float
    low: float
    high: float
    n: int

    def format(self, digits: int = 3) -> str:
        """`0.812 [0.790, 0.833]`."""
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def mean_interval(values: Sequence[float], num_resamples: int = 2000) -> Interval | None:
    """Mean of one value per prompt, with the percentile bootstrap interval over prompts.

    The same resamples are drawn every time for the same n, so that a result is reproducible. None
    for no values. ValueError if a value is not finite.
    """
    if not values:
        return None
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"values must be finite, got {array[~np.isfinite(array)][0]}")
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    picks = rng.integers(0, len(array), size=(num_resamples, len(array)))
    low, high = np.quantile(array[picks].mean(axis=1), [0.025, 0.975])
    return Interval(float(array.mean()), float(low), float(high), len(array))


def wins(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Per pair of scores: 1 where ours is higher, 0 where theirs is, 1/2 where they are equal."""
    if len(ours) != len(theirs):
        raise ValueError(f"paired scores must be as many, got {len(ours)} and {len(theirs)}")
    return [0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)]


def per_prompt(prompts: Sequence[str], values: Sequence[float]) -> list[float]:
    """Average the values of each prompt; prompts in order of first appearance."""
    grouped: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        grouped.setdefault(prompt, []).append(value)
    return [sum(group) / len(group) for group in grouped.values()]
