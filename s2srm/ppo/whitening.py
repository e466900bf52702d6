"""Mean, variance and whitening over the tokens of all ranks; there is no padding to mask."""

from __future__ import annotations

import torch
from torch import Tensor

from s2srm import distributed


def global_moments(values: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and (biased) variance over all ranks, float64 scalars, and the number of values.

    values: (N,) of this rank, N may be 0. Of no values at all, mean and variance are 0. Two passes,
    so that a large mean does not eat the variance.
    """
    values = values.detach().double()
    totals = distributed.sum_over_ranks(torch.stack([torch.ones_like(values).sum(), values.sum()]))
    count = totals[0].clamp_min(1.0)
    mean = totals[1] / count
    variance = distributed.sum_over_ranks(((values - mean) ** 2).sum()) / count
    return mean, variance, int(totals[0])


def whiten(values: Tensor, eps: float = 1e-8) -> Tensor:
    """(values - mean) / sqrt(variance + eps), both over all ranks; same dtype and shape."""
    mean, variance, _ = global_moments(values)
    return ((values.double() - mean) * torch.rsqrt(variance + eps)).to(values.dtype)
