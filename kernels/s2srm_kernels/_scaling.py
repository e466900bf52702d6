"""Backward of the losses whose gradients are made in forward: multiply by the scalar upstream.

An operator of its own so that a second derivative is an error and not a silent constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from s2srm_kernels._operators import define, operator, refuse_second_order

_NAME = "linear_loss_backward"
_Three = tuple[Tensor, Tensor, Tensor]


def _reference(
    grad_loss: Tensor, d_hidden: Tensor, d_weight: Tensor, d_bias: Tensor, dtype: torch.dtype
) -> _Three:
    return (
        (d_hidden * grad_loss).to(dtype),
        (d_weight * grad_loss).to(dtype),
        (d_bias * grad_loss).to(dtype),
    )


def _fake(
    grad_loss: Tensor, d_hidden: Tensor, d_weight: Tensor, d_bias: Tensor, dtype: torch.dtype
) -> _Three:
    return (
        torch.empty_like(d_hidden, dtype=dtype),
        torch.empty_like(d_weight, dtype=dtype),
        torch.empty_like(d_bias, dtype=dtype),
    )


define(
    _NAME,
    "(Tensor grad_loss, Tensor d_hidden, Tensor d_weight, Tensor d_bias, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    backward=refuse_second_order(_NAME),
)


def scale_gradients(
    grad_loss: Tensor, saved: Sequence[Tensor], dtype: torch.dtype, needs: Sequence[bool]
) -> list[Tensor | None]:
    """grad_loss times the three saved gradients, in the inputs' dtype; None where not needed."""
    scaled = operator(_NAME, "reference")(grad_loss, *saved, dtype)
    return [g if need else None for g, need in zip(scaled, needs, strict=True)]


def needed_gradients(*tensors: Tensor | None) -> list[bool]:
    """Which gradients to make in forward: those that autograd would ask for."""
    enabled = torch.is_grad_enabled()
    return [enabled and t is not None and t.requires_grad for t in tensors]


def fake_gradients(
    hidden: Tensor, weight: Tensor, needs: Sequence[bool], dtype: torch.dtype
) -> _Three:
    """Shapes of (d_hidden, d_weight, d_bias): empty where not needed."""
    shapes: tuple[Any, ...] = (hidden.shape, weight.shape, weight.shape[:1])
    d_hidden, d_weight, d_bias = (
        hidden.new_empty(shape if need else (0,), dtype=dtype)
        for shape, need in zip(shapes, needs, strict=True)
    )
    return d_hidden, d_weight, d_bias
