"""Backward of the losses whose gradients are made in forward: multiply by the scalar upstream.

An operator of its own that also takes hidden, weight and bias, for the sake of autograd alone: a
second derivative is an error then and not a silent constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor  # of is_grads_batched

from s2srm_kernels.checks import kept_dtype
from s2srm_kernels.dispatch import define, engine_of, operator, refuse_second_order

_NAME = "linear_loss_backward"
_Three = tuple[Tensor, Tensor, Tensor]


def _reference(
    grad_loss: Tensor, d_hidden: Tensor, d_weight: Tensor, d_bias: Tensor, hidden: Tensor, *_: Any
) -> _Three:
    d_hidden, d_weight, d_bias = (
        (d.to(grad_loss.dtype) * grad_loss).to(hidden.dtype) for d in (d_hidden, d_weight, d_bias)
    )
    return d_hidden, d_weight, d_bias


def _fake(
    grad_loss: Tensor, d_hidden: Tensor, d_weight: Tensor, d_bias: Tensor, hidden: Tensor, *_: Any
) -> _Three:
    return (
        torch.empty_like(d_hidden, dtype=hidden.dtype),
        torch.empty_like(d_weight, dtype=hidden.dtype),
        torch.empty_like(d_bias, dtype=hidden.dtype),
    )


define(
    _NAME,
    "(Tensor grad_loss, Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor hidden,"
    " Tensor weight, Tensor? bias) -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    backward=refuse_second_order(_NAME),
)


def save_gradients(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """setup_context of such a loss: inputs begin with hidden, weight, bias; output with the loss.

    Everything but the loss is a constant to autograd.
    """
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[-3:], *inputs[:3])


def scale_gradients(impl: str, ctx: Any, grad_loss: Tensor) -> list[Tensor | None]:
    """grad_loss times what `save_gradients` kept, in the inputs' dtype; None where not needed."""
    saved = ctx.saved_tensors  # once: a checkpoint gives them out no second time
    gradients, inputs = saved[:3], saved[3:]
    if gradients[0].dtype == inputs[0].dtype and _is_last(grad_loss):
        scaled = gradients
        engine_of(impl).scale_(gradients, grad_loss)
    else:
        scaled = operator(_NAME, "reference")(grad_loss, *gradients, *inputs)
    needs = ctx.needs_input_grad[:3]
    return [g if need else None for g, need in zip(scaled, needs, strict=True)]


def _is_last(grad_loss: Tensor) -> bool:
    """Whether the kept gradients may be scaled in place and given away.

    A gradient of the weight may be the largest tensor of a program: `loss.backward()` makes no
    second copy of it. Whoever is handed a gradient may write to it, so only a backward that
    releases the graph gives the kept ones away. Not while torch.compile traces, nor for batched
    gradients: those have no value to look at.
    """
    return (
        type(grad_loss) is Tensor
        and not is_legacy_batchedtensor(grad_loss)
        and not torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore
    )


def wanted_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[bool]:
    """Which gradients autograd would ask for.

    NotImplementedError under torch.jit.trace, which knows no list of booleans.
    """
    if not torch.compiler.is_compiling() and torch._C._is_tracing():  # pyright: ignore
        raise NotImplementedError(
            "torch.jit.trace cannot hold a linear loss: use torch.export or torch.compile"
        )
    enabled = torch.is_grad_enabled()
    return [enabled and t is not None and t.requires_grad for t in (hidden, weight, bias)]


def fits_in_forward(impl: str, hidden: Tensor, weight: Tensor, workspace_bytes: int | None) -> bool:
    """Whether the backend makes a loss's gradients in its forward."""
    return engine_of(impl).gradients_in_forward(hidden, weight, workspace_bytes)


def keep(gradients: _Three, hidden: Tensor) -> _Three:
    """Gradients in the dtype in which they wait for backward."""
    d_hidden, d_weight, d_bias = (g.to(kept_dtype(hidden.dtype)) for g in gradients)
    return d_hidden, d_weight, d_bias


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
