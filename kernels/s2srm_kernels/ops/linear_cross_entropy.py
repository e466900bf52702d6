"""Cross-entropy of the LM head's logits without the logits: the sequence-MLE loss.

    loss_i = w_i * ((1 - s) * (lse_i - z_i,target) + s * mean_v(lse_i - z_i,v) + z_loss * lse_i^2)

with s the label smoothing. "mean" and "sum" know their upstream coefficients once a row's
statistics are known, so the gradients are made in the same pass over the chunks (three products
instead of four); backward only multiplies by the scalar upstream gradient. "none" makes the logits
again in backward. Source: torch.nn.functional.cross_entropy for the smoothing, PaLM (arXiv
2204.02311, section 5) for the z-loss, gradients in forward as in github.com/mgmalek/
efficient_cross_entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s2srm_kernels._checks import (
    autocast_inputs,
    check_floating,
    check_head,
    check_head_options,
    check_number,
    check_rows,
    compute_dtype,
)
from s2srm_kernels._gradients import Upstream, recompute_gradients, statistics_with_gradients
from s2srm_kernels._head import Head
from s2srm_kernels._operators import (
    define,
    operator,
    refuse_second_order,
    select,
)
from s2srm_kernels._scaling import (
    fake_gradients,
    needed_gradients,
    save_gradients,
    scale_gradients,
)
from s2srm_kernels._shards import group_name
from s2srm_kernels._statistics import RowStatistics

_NAME = "linear_cross_entropy"
_BACKWARD = "linear_cross_entropy_backward"
_REDUCTIONS = ("mean", "sum", "none")


def _reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    group: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = Head(hidden, weight, bias, target, softcap, temperature, ignore_index, group)
    scale = _row_scale(head, row_weight)
    if reduction == "mean":
        scale = scale / max(head.num_live, 1)

    def upstream_of(stats: RowStatistics, rows: slice) -> Upstream:
        return _upstream(stats.lse, scale[rows], label_smoothing, z_loss)

    stats, gradients = statistics_with_gradients(head, upstream_of, needs)
    nll = -(1 - label_smoothing) * stats.logprobs
    if label_smoothing:
        nll = nll - label_smoothing * stats.mean_logprob
    if z_loss:
        nll = nll + z_loss * stats.lse.square()
    residual = head.scatter(torch.stack([stats.max_logit, stats.log_sum], dim=1))
    losses = scale * nll
    return (head.scatter(losses) if reduction == "none" else losses.sum(), residual, *gradients)


def _backward_reference(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    residual: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    group: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(hidden, weight, bias, target, softcap, temperature, ignore_index, group)
    max_logit, log_sum = residual[head.rows].unbind(dim=1)
    scale = _row_scale(head, row_weight) * grad_loss[head.rows].to(head.dtype)
    upstream = _upstream(max_logit + log_sum, scale, label_smoothing, z_loss)
    gradients = recompute_gradients(head, max_logit, log_sum, None, upstream, needs)
    d_hidden, d_weight, d_bias = (g.to(hidden.dtype) for g in gradients)
    return d_hidden, d_weight, d_bias


def _row_scale(head: Head, row_weight: Tensor | None) -> Tensor:
    live = head.live(row_weight)
    return head.weight.new_ones(head.num_live) if live is None else live


def _upstream(lse: Tensor, scale: Tensor, label_smoothing: float, z_loss: float) -> Upstream:
    """Derivatives of scale * loss_i by the row's log p(target), lse and mean log p."""
    return Upstream(
        logprobs=-(1 - label_smoothing) * scale,
        lse=2 * z_loss * lse * scale if z_loss else None,
        mean_logprob=-label_smoothing * scale if label_smoothing else None,
    )


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    reduction: str,
    *rest: Any,
) -> tuple[Tensor, ...]:
    n, dtype = hidden.shape[0], compute_dtype(hidden)
    loss = hidden.new_empty((n,) if reduction == "none" else (), dtype=dtype)
    residual = hidden.new_empty((n, 2), dtype=dtype)
    return (loss, residual, *fake_gradients(hidden, weight, rest[-1], dtype))


def _backward_fake(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(hidden, weight, rest[-1], hidden.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, row_weight, ctx.reduction, *options, _ = inputs
    ctx.options = options
    if ctx.reduction == "none":
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(hidden, weight, bias, target, row_weight, output[1])
    else:
        save_gradients(ctx, inputs, output)


def _backward(impl: str, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_loss = grads[0]
    if grad_loss is None:
        return (None,) * 13
    if ctx.reduction == "none":
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        gradients = operator(_BACKWARD, impl)(grad_loss, *ctx.saved_tensors, *ctx.options, needs)
        made = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    else:
        made = scale_gradients(ctx, grad_loss)
    return (*made, *[None] * 10)


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? row_weight"
_OPTIONS = (
    "float label_smoothing, float z_loss, float? softcap, float temperature, int ignore_index,"
    " str? group, bool[] needs"
)

define(
    _BACKWARD,
    f"(Tensor grad_loss, {_HEAD}, Tensor residual, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    backward=refuse_second_order(_BACKWARD),
)
define(
    _NAME,
    f"({_HEAD}, str reduction, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    process_group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """cross_entropy(z, target, label_smoothing=...) + z_loss * logsumexp(z)^2, times row_weight.

    z = hidden @ weight.T + bias, then softcap * tanh(z / softcap), then / temperature, in float32
    at least (float64 for float64 inputs).

    hidden (N, D) and weight (V, D), bias (V,) of one floating dtype (under autocast they are cast
    to its dtype); target (N,) int64 or int32; row_weight (N,) floating, a constant (it must not
    require a gradient). reduction "sum" gives the sum over live rows, "mean" divides it by the
    *number* of live rows, "none" gives (N,) losses with 0 in ignored rows. Nats, float32 (float64
    for float64 inputs). Without a live row the loss and every gradient are 0. Rows with
    ignore_index are never read. Differentiable once in hidden, weight and bias, each on its own.

    Memory: at most max(128 V, 2**24) logits at a time, the weight upcast, and for "mean" and "sum"
    the needed gradients in the compute dtype from forward to backward.

    process_group: as in linear_logprobs; the all-reduce of the hidden gradient is in forward for
    "mean" and "sum".

    ValueError: a bad shape, dtype, device, option, an `impl` that is not available, or a target
    out of range (naming the row; on CUDA that check shares the operator's one synchronisation).
    NotImplementedError: a second derivative.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")
    check_number("label_smoothing", label_smoothing, 0.0, 1.0)
    check_number("z_loss", z_loss, 0.0)
    check_head_options(softcap, temperature)
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    check_head(hidden, weight, bias, target)
    if row_weight is not None:
        check_rows("row_weight", row_weight, hidden)
        check_floating("row_weight", row_weight)
        if row_weight.requires_grad:
            raise ValueError("row_weight requires a gradient but is a constant here: detach it")
    needs = [False] * 3 if reduction == "none" else needed_gradients(hidden, weight, bias)
    op = select(_NAME, impl, hidden.device)
    return op(
        *(hidden, weight, bias, target, row_weight, reduction, label_smoothing, z_loss),
        *(softcap, temperature, ignore_index, group_name(process_group), needs),
    )[0]
