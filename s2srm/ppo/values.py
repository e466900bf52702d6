"""The critic's loss, and how much of the returns it explains."""

from __future__ import annotations

import torch
from torch import Tensor

from s2srm.ppo.whitening import moments


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float, normalizer: float
) -> Tensor:
    """sum of 1/2 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / normalizer.

    Args:
        values: (N,) with gradient.
        old_values: (N,) of the critic that collected the experience.
        returns: (N,) targets.
        clip: c; 0 does not clip.
        normalizer: number of tokens of the minibatch over all ranks and micro-batches.
    """
    error = (values - returns) ** 2
    if clip > 0:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * error.sum() / normalizer


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); 0 if the returns are constant."""
    _, residual = moments(returns - values)
    _, total = moments(returns)
    return float(1.0 - residual / total) if float(total) > 0 else 0.0
