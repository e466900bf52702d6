"""Pearson's correlation from sums that add up over parts."""

from __future__ import annotations

import pytest
import torch

from s2srm.correlation import correlation, joint_moments


def test_correlation_from_added_moments() -> None:
    x = torch.tensor([1.0, 4.0, 2.0, 8.0, 5.0])
    y = torch.tensor([2.0, 3.0, 1.0, 9.0, 2.0])
    wanted = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    assert correlation(joint_moments(x, y).tolist()) == pytest.approx(wanted)
    halves = joint_moments(x[:2], y[:2]) + joint_moments(x[2:], y[2:])
    assert correlation(halves.tolist()) == pytest.approx(wanted)


def test_nothing_that_varies_is_no_correlation() -> None:
    x = torch.tensor([1.0, 4.0, 2.0])
    assert correlation(joint_moments(x, torch.ones(3)).tolist()) == 0.0
    assert correlation(joint_moments(torch.ones(3), x).tolist()) == 0.0
    assert correlation(joint_moments(x[:0], x[:0]).tolist()) == 0.0
