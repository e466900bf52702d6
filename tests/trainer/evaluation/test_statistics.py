"""Intervals that cover, wins that are paired, prompts as the unit."""

from __future__ import annotations

import math

import numpy as np
import pytest

from s2srm.evaluation.statistics import Interval, mean_interval, per_prompt, wins


def test_interval_of_a_constant_has_no_width():
    assert mean_interval([0.25] * 10) == Interval(0.25, 0.25, 0.25, 10)


def test_no_values_no_interval():
    assert mean_interval([]) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        mean_interval([0.5, bad])


def test_interval_is_close_to_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    found = mean_interval(values.tolist())
    assert found is not None
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        found = mean_interval((rng.random(100) < 0.3).astype(float).tolist(), 500)
        assert found is not None
        covered += found.low <= 0.3 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_same_values_give_the_same_interval():
    values = [0.0, 1.0, 1.0, 0.5]
    assert mean_interval(values) == mean_interval(values)


def test_ties_count_half():
    assert wins([1.0, 0.0, 0.5], [0.0, 1.0, 0.5]) == [1.0, 0.0, 0.5]


def test_pairs_must_match():
    with pytest.raises(ValueError, match="got 1 and 2"):
        wins([1.0], [0.0, 1.0])


def test_prompts_are_the_unit():
    assert per_prompt(["a", "b", "a", "a"], [1.0, 5.0, 2.0, 3.0]) == [2.0, 5.0]
