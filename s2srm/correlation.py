"""Pearson's correlation of numbers that lie on several ranks: sums that add up, then a quotient."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def joint_moments(x: Tensor, y: Tensor) -> Tensor:
    """(6,) float64: n, sum x, sum y, sum x^2, sum y^2, sum xy; they add up over parts and ranks."""
    x, y = x.double(), y.double()
    sums = [x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]
    return torch.stack([x.new_tensor(float(x.numel())), *sums])


def correlation(added: Iterable[float]) -> float:
    """Pearson's correlation from added-up `joint_moments`; 0 where x or y does not vary."""
    n, x, y, xx, yy, xy = added
    if n == 0:
        return 0.0
    var_x, var_y = xx / n - (x / n) ** 2, yy / n - (y / n) ** 2
    if var_x <= 1e-12 * max(1.0, xx / n) or var_y <= 1e-12 * max(1.0, yy / n):
        return 0.0
    return (xy / n - x * y / n**2) / math.sqrt(var_x * var_y)
