"""Mean, variance and whitening over the tokens of a phase; there is no padding to mask."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of (N,) values, float64 scalars; both are 0 where N is 0.

    Two passes, so that a large mean does not eat the variance.
    """
    values = values.detach().double()
    count = max(values.numel(), 1)
    mean = values.sum() / count
    return mean, ((values - mean) ** 2).sum() / count


def whiten(values: Tensor, eps: float = 1e-8) -> Tensor:
    """(values - mean) / sqrt(variance + eps); same dtype and shape."""
    mean, variance = moments(values)
    return ((values.double() - mean) * torch.rsqrt(variance + eps)).to(values.dtype)
