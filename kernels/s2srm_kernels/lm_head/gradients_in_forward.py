"""Backward of the losses whose gradients are made in forward: multiply by the scalar upstream.

An operator of its own that also takes hidden, weight and bias, for the sake of autograd alone: a
second derivative is an error then and not a silent constant.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor  # of is_grads_batched

from s2srm_kernels.checks import kept_dtype
from s2srm_kernels.dispatch import define, engine_of, operator, refuse_second_order, schema_of
from s2srm_kernels.lm_head.engine import ThreeGradients
from s2srm_kernels.lm_head.operation import Inputs, save_values, saved_values

_NAME = "linear_loss_backward"


def _reference(
    grad_loss: Tensor,
    d_hidden: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_hidden, d_weight, d_bias = (
        (d.to(grad_loss.dtype) * grad_loss).to(hidden.dtype) for d in (d_hidden, d_weight, d_bias)
    )
    return d_hidden, d_weight, d_bias


def _fake(
    grad_loss: Tensor, d_hidden: Tensor, d_weight: Tensor, d_bias: Tensor, hidden: Tensor, *_: Any
) -> ThreeGradients:
    return (
        torch.empty_like(d_hidden, dtype=hidden.dtype),
        torch.empty_like(d_weight, dtype=hidden.dtype),
        torch.empty_like(d_bias, dtype=hidden.dtype),
    )


def _refuse(impl: str, ctx: Any, *grads: Tensor | None) -> NoReturn:
    refuse_second_order(_NAME)


define(_NAME, schema_of(_reference), _fake, reference=_reference, backward=_refuse)


def save_gradients(ctx: Any, inputs: Inputs, gradients: ThreeGradients, owned: bool) -> None:
    """Keep what `scale_gradients` takes. owned: nobody else has these gradients."""
    ctx.owned = owned
    save_values(ctx, *gradients, inputs.hidden, inputs.weight, inputs.bias)


def scale_gradients(impl: str, ctx: Any, grad_loss: Tensor) -> ThreeGradients:
    """grad_loss times what `save_gradients` kept, in the inputs' dtype."""
    d_hidden, d_weight, d_bias, *inputs = saved_values(ctx)
    gradients = (d_hidden, d_weight, d_bias)
    if ctx.owned and d_hidden.dtype == inputs[0].dtype and _is_last(grad_loss):
        engine_of(impl).scale_(gradients, grad_loss)
        return gradients
    return operator(_NAME, "reference")(grad_loss, *gradients, *inputs)


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


def made_in_forward(impl: str, inputs: Inputs, workspace_bytes: int | None) -> bool:
    """Whether the backend makes a loss's gradients in its forward: they are asked for and fit."""
    if not any(inputs.needs) or inputs.group is not None:
        return False
    return engine_of(impl).gradients_in_forward(inputs.hidden, inputs.weight, workspace_bytes)


def kept_gradients(gradients: ThreeGradients, inputs: Inputs) -> ThreeGradients:
    """Gradients in the dtype in which they wait for backward."""
    d_hidden, d_weight, d_bias = (g.to(kept_dtype(inputs.hidden.dtype)) for g in gradients)
    return d_hidden, d_weight, d_bias


def fake_kept_gradients(inputs: Inputs, in_forward: bool) -> ThreeGradients:
    """Shapes of `kept_gradients`: empty where not needed, or not made in forward."""
    needs = inputs.needs if in_forward else [False] * 3
    return fake_gradients(inputs._replace(needs=needs), kept_dtype(inputs.hidden.dtype))


def fake_gradients(inputs: Inputs, dtype: torch.dtype | None = None) -> ThreeGradients:
    """Shapes of (d_hidden, d_weight, d_bias), by default of the inputs' dtype."""
    hidden, weight = inputs.hidden, inputs.weight
    shapes: tuple[Any, ...] = (hidden.shape, weight.shape, weight.shape[:1])
    d_hidden, d_weight, d_bias = (
        hidden.new_empty(shape if need else (0,), dtype=dtype or hidden.dtype)
        for shape, need in zip(shapes, inputs.needs, strict=True)
    )
    return d_hidden, d_weight, d_bias
