"""float64 models whose weight gradients are float64 too.

Gemma's RMSNorm computes in float32 whatever the model is, its weight included, so that the weight's
gradient is a float32 sum over all tokens of a batch and depends on how they are packed. The values
stay Gemma's own to the bit here; only that sum is taken in float64.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn


def sum_norm_gradients_in_float64(lm: nn.Module) -> None:
    """Replace the forward of every Gemma norm of a float64 model; other models are left alone."""
    for module in lm.modules():
        weight = getattr(module, "weight", None)
        if (
            type(module).__name__.startswith("Gemma")
            and type(module).__name__.endswith("RMSNorm")
            and isinstance(weight, Tensor)
            and weight.dtype == torch.float64
        ):
            module.forward = MethodType(_gemma_norm, module)


def _gemma_norm(self: nn.Module, x: Tensor) -> Tensor:
    """Gemma's RMSNorm(x): norm(float32(x)) * (1 + float32(weight)), as x's type."""
    weight, norm = self.weight, self._norm
    assert isinstance(weight, Tensor) and callable(norm)
    normalized = norm(x.float())
    scaled = (normalized * (1.0 + weight.detach().float())).type_as(x)
    # Adds nothing, and carries the weight's gradient.
    return scaled + normalized.detach().type_as(x) * (weight - weight.detach())
