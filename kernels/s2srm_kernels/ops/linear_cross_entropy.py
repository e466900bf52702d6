"""Cross-entropy of the LM head's logits without the logits: the sequence-MLE loss.

    loss_i = w_i * ((1 - s) * (lse_i - z_i,target) + s * mean_v(lse_i - z_i,v) + z_loss * lse_i^2)

with s the label smoothing. "mean" and "sum" know their upstream coefficients once a row's
statistics are known, so where the workspace allows it the gradients are made in the same pass over
the chunks (three products instead of four) and backward only multiplies by the scalar upstream
gradient. "none", tile skipping and vocabulary-parallel weights make the logits again in backward.
Source: torch.nn.functional.cross_entropy for the smoothing, PaLM (arXiv
2204.02311, section 5) for the z-loss, gradients in forward as in github.com/mgmalek/
efficient_cross_entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s2srm_kernels.checks import (
    autocast_inputs,
    check_floating,
    check_head,
    check_rows,
    check_tensors,
    check_whole,
    check_workspace,
    compute_dtype,
    kept_dtype,
)
from s2srm_kernels.dispatch import choose, define_vocabulary, operator, refuse_second_order
from s2srm_kernels.lm_head.backward import no_gradients, recompute_gradients
from s2srm_kernels.lm_head.engine import Engine, RowStatistics, ThreeGradients, Upstream, Wanted
from s2srm_kernels.lm_head.gradients_in_forward import (
    fake_gradients,
    fits_in_forward,
    keep,
    save_gradients,
    scale_gradients,
    wanted_gradients,
)
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.shards import group_name
from s2srm_kernels.lm_head.skipping import SkipReport, fake_plan, statistics_and_plan
from s2srm_kernels.lm_head.statistics import fake_residual, residual_of, statistics_of
from s2srm_kernels.options import Number, may_be_nonzero, pack_options, unpack_options

_NAME = "linear_cross_entropy"
_BACKWARD = "linear_cross_entropy_backward"
_REDUCTIONS = ("mean", "sum", "none")
_OPTIONS = ("temperature", "softcap", "label_smoothing", "z_loss", "skip_mass")


def _body(
    engine: Engine,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    options: Tensor,
    reduction: str,
    skips: bool,
    ignore_index: int,
    group: str | None,
    workspace_bytes: int | None,
    needs: Sequence[bool],
    in_forward: bool,
) -> tuple[Tensor, ...]:
    """(loss, residual, live blocks, skipped mass, d_hidden, d_weight, d_bias).

    in_forward: the gradients are made too; without, only what a backward of its own needs.
    """
    values = unpack_options(options, *_OPTIONS)
    temperature, softcap, label_smoothing, z_loss, skip_mass = values
    facts = {"operation": _NAME, "which inputs need gradients": list(needs)}
    facts |= {"reduction": reduction, "label_smoothing, z_loss and skip_mass": values[2:]}
    head = Head(hidden, weight, bias, target, softcap, temperature, ignore_index, group, **facts)
    scale = _row_scale(head, row_weight, reduction)
    wanted = Wanted(maximum=False, entropy=False, mean=label_smoothing != 0)

    def upstream_of(stats: RowStatistics, rows: slice) -> Upstream:
        return _upstream(stats.lse, scale[rows], label_smoothing, z_loss)

    if in_forward and head.num_live > 0:
        stats, gradients = engine.statistics_with_gradients(
            head, upstream_of, needs, workspace_bytes, wanted, proportional=not label_smoothing
        )
        skipped = torch.zeros_like(stats.max_logit)
        live = head.rows.new_empty((0, 0), dtype=torch.bool)
    else:
        budget = skip_mass if skips else None
        stats, live, skipped = statistics_and_plan(engine, head, budget, wanted)
        gradients = no_gradients(head, needs if in_forward else [False] * 3)
    nll = -(1 - label_smoothing) * stats.logprobs
    if label_smoothing:
        nll = nll - label_smoothing * stats.mean_logprob
    if z_loss:
        nll = nll + z_loss * stats.lse.square()
    losses = scale * nll
    loss = head.scatter(losses) if reduction == "none" else losses.sum()
    return (
        loss,
        head.scatter(residual_of(stats)),
        live,
        head.scatter(skipped),
        *keep(gradients, hidden),
    )


def _backward_body(
    engine: Engine,
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    options: Tensor,
    residual: Tensor,
    live: Tensor,
    reduction: str,
    ignore_index: int,
    group: str | None,
    needs: Sequence[bool],
) -> ThreeGradients:
    temperature, softcap, label_smoothing, z_loss, _ = unpack_options(options, *_OPTIONS)
    facts = {"operation": _BACKWARD, "which inputs need gradients": list(needs)}
    head = Head(hidden, weight, bias, target, softcap, temperature, ignore_index, group, **facts)
    stats = statistics_of(residual, head)
    upstream_rows = grad_loss[head.rows] if reduction == "none" else grad_loss
    scale = _row_scale(head, row_weight, reduction) * upstream_rows.to(head.dtype)
    upstream = _upstream(stats.lse, scale, label_smoothing, z_loss)
    return recompute_gradients(engine, head, stats, upstream, needs, live if live.numel() else None)


def _row_scale(head: Head, row_weight: Tensor | None, reduction: str) -> Tensor:
    """(R,) factor of each row's loss in the result."""
    live = head.live(row_weight)
    scale = head.weight.new_ones(head.num_live, dtype=head.dtype) if live is None else live
    return scale / max(head.num_live, 1) if reduction == "mean" else scale


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
    options: Tensor,
    reduction: str,
    skips: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    n, dtype = hidden.shape[0], compute_dtype(hidden)
    *_, needs, in_forward = rest
    loss = hidden.new_empty((n,) if reduction == "none" else (), dtype=dtype)
    live = fake_plan(hidden, weight, skips)
    kept = kept_dtype(hidden.dtype)
    gradients = fake_gradients(hidden, weight, needs if in_forward else [False] * 3, kept)
    return (loss, fake_residual(hidden), live, hidden.new_empty(n, dtype=dtype), *gradients)


def _backward_fake(grad_loss: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> ThreeGradients:
    return fake_gradients(hidden, weight, rest[-1], hidden.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, reduction, _, ignore_index, group, _, _, ctx.gradients_made = inputs
    if ctx.gradients_made:
        save_gradients(ctx, inputs, output)
        return
    ctx.options = (reduction, ignore_index, group)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:3])


def _backward(impl: str, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_loss = grads[0]
    if grad_loss is None:
        return (None,) * 13
    if ctx.gradients_made:
        made = scale_gradients(impl, ctx, grad_loss)
    else:
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        gradients = operator(_BACKWARD, impl)(grad_loss, *ctx.saved_tensors, *ctx.options, needs)
        made = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return (*made, *[None] * 10)


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? row_weight"

define_vocabulary(
    _BACKWARD,
    f"(Tensor grad_loss, {_HEAD}, Tensor options, Tensor residual, Tensor live, str reduction,"
    " int ignore_index, str? group, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _backward_body,
    _backward_fake,
    backward=refuse_second_order(_BACKWARD),
)
define_vocabulary(
    _NAME,
    f"({_HEAD}, Tensor options, str reduction, bool skips, int ignore_index, str? group,"
    " int? workspace_bytes, bool[] needs, bool in_forward)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _body,
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
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
    softcap: Number | None = None,
    temperature: Number = 1.0,
    skip_mass: Number = 0.0,
    skip_report: SkipReport | None = None,
    workspace_bytes: int | None = None,
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

    workspace_bytes: bound on the temporary memory. Where a chunk of logits (and on a GPU, unless
    that holds all rows, a float32 sum of the weight gradient) fits, "mean" and "sum" make their
    gradients in forward:
    three products; otherwise, and always for "none", with skip_mass or a process_group, backward
    makes the logits again: four. None is the backend's own bound; see kernels/README.md.

    skip_mass, skip_report: as in linear_logprobs; the bound there holds without label smoothing,
    and with z-loss for the sum of the two upstream gradients.

    process_group: as in linear_logprobs.

    ValueError: a bad shape, dtype, device, option, an `impl` that is not available, or a target
    out of range (naming the row; on CUDA that check shares the operator's one synchronisation).
    NotImplementedError: a second derivative.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")
    check_tensors(
        _NAME, hidden=hidden, weight=weight, bias=bias, target=target, row_weight=row_weight
    )
    options = pack_options(
        temperature=temperature,
        softcap=softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        skip_mass=skip_mass,
    )
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    check_head(hidden, weight, bias, target)
    check_whole("ignore_index", ignore_index)
    if row_weight is not None:
        check_rows("row_weight", row_weight, hidden)
        check_floating("row_weight", row_weight)
        if row_weight.requires_grad:
            raise ValueError("row_weight requires a gradient but is a constant here: detach it")
    check_workspace(workspace_bytes)
    chosen = choose(_NAME, impl, hidden.device)
    needs, skips = wanted_gradients(hidden, weight, bias), may_be_nonzero(skip_mass)
    in_forward = any(needs) and reduction != "none" and not skips and process_group is None
    in_forward = in_forward and fits_in_forward(chosen, hidden, weight, workspace_bytes)
    loss, _, _, skipped, *_ = operator(_NAME, chosen)(
        *(hidden, weight, bias, target, row_weight, options, reduction, skips),
        *(ignore_index, group_name(process_group), workspace_bytes, needs, in_forward),
    )
    if skip_report is not None:
        skip_report.mass = skipped
    return loss
