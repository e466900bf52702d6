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

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from s2srm_kernels.checks import check_workspace, compute_dtype
from s2srm_kernels.lm_head.backward import no_gradients, recompute_gradients
from s2srm_kernels.lm_head.call import prepare
from s2srm_kernels.lm_head.engine import Engine, RowStatistics, Upstream, Wanted
from s2srm_kernels.lm_head.gradients_in_forward import (
    fake_gradients,
    fake_kept_gradients,
    kept_gradients,
    made_in_forward,
    save_gradients,
    scale_gradients,
)
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.operation import (
    Gradients,
    Inputs,
    define_backward,
    define_operation,
    save_values,
    saved_values,
)
from s2srm_kernels.lm_head.skipping import SkipReport, fake_plan, statistics_and_plan
from s2srm_kernels.lm_head.statistics import fake_residual, residual_of, statistics_of
from s2srm_kernels.options import Number, may_be_nonzero, pack_options

_NAME = "linear_cross_entropy"
_BACKWARD = "linear_cross_entropy_backward"
_REDUCTIONS = ("mean", "sum", "none")
_OPTIONS = ("label_smoothing", "z_loss", "skip_mass")


class _Arguments(NamedTuple):
    """in_forward: the gradients are made too; without, only what a backward of its own needs.
    owned: the caller keeps none of the made gradients, so that backward may write to them."""

    row_weight: Tensor | None
    reduction: str
    skips: bool
    workspace_bytes: int | None
    in_forward: bool
    owned: bool


class _Results(NamedTuple):
    loss: Tensor
    residual: Tensor
    live: Tensor
    skipped: Tensor
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor


class _BackwardArguments(NamedTuple):
    grad_loss: Tensor
    row_weight: Tensor | None
    residual: Tensor
    live: Tensor
    reduction: str


def _body(engine: Engine, inputs: Inputs, own: _Arguments) -> _Results:
    head, values = inputs.open(_NAME, *_OPTIONS, reduction=own.reduction)
    label_smoothing, z_loss, skip_mass = values
    scale = _row_scale(head, own.row_weight, own.reduction)
    wanted = Wanted(maximum=False, entropy=False, mean=label_smoothing != 0)

    def upstream_of(stats: RowStatistics, rows: slice) -> Upstream:
        return _upstream(stats.lse, scale[rows], label_smoothing, z_loss)

    if own.in_forward and head.num_live > 0:
        stats, gradients = engine.statistics_with_gradients(
            *(head, upstream_of, inputs.needs, own.workspace_bytes, wanted),
            proportional=not label_smoothing,
        )
        skipped = torch.zeros_like(stats.max_logit)
        live = head.rows.new_empty((0, 0), dtype=torch.bool)
    else:
        budget = skip_mass if own.skips else None
        stats, live, skipped = statistics_and_plan(engine, head, budget, wanted)
        gradients = no_gradients(head, inputs.needs if own.in_forward else [False] * 3)
    nll = -(1 - label_smoothing) * stats.logprobs
    if label_smoothing:
        nll = nll - label_smoothing * stats.mean_logprob
    if z_loss:
        nll = nll + z_loss * stats.lse.square()
    losses = scale * nll
    return _Results(
        head.scatter(losses) if own.reduction == "none" else losses.sum(),
        head.scatter(residual_of(stats)),
        live,
        head.scatter(skipped),
        *kept_gradients(gradients, inputs),
    )


def _fake(inputs: Inputs, own: _Arguments) -> _Results:
    hidden, dtype = inputs.hidden, compute_dtype(inputs.hidden)
    n = hidden.shape[0]
    return _Results(
        hidden.new_empty((n,) if own.reduction == "none" else (), dtype=dtype),
        fake_residual(hidden),
        fake_plan(hidden, inputs.weight, own.skips),
        hidden.new_empty(n, dtype=dtype),
        *fake_kept_gradients(inputs, own.in_forward),
    )


def _backward_body(engine: Engine, inputs: Inputs, own: _BackwardArguments) -> Gradients:
    head, (label_smoothing, z_loss, _) = inputs.open(_BACKWARD, *_OPTIONS)
    stats = statistics_of(own.residual, head)
    upstream_rows = own.grad_loss[head.rows] if own.reduction == "none" else own.grad_loss
    scale = _row_scale(head, own.row_weight, own.reduction) * upstream_rows.to(head.dtype)
    upstream = _upstream(stats.lse, scale, label_smoothing, z_loss)
    live = own.live if own.live.numel() else None
    return Gradients(*recompute_gradients(engine, head, stats, upstream, inputs.needs, live))


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


def _save(ctx: Any, inputs: Inputs, own: _Arguments, results: _Results) -> None:
    ctx.mark_non_differentiable(*results[1:])
    ctx.gradients_made = own.in_forward
    if own.in_forward:
        gradients = (results.d_hidden, results.d_weight, results.d_bias)
        save_gradients(ctx, inputs, gradients, own.owned)
    else:
        kept = (own.row_weight, results.residual, results.live, own.reduction)
        save_values(ctx, *kept, *inputs)


def _backward(impl: str, ctx: Any, grads: Any) -> tuple[Tensor | None, ...]:
    if grads.loss is None:
        return (None, None, None)
    if ctx.gradients_made:
        return scale_gradients(impl, ctx, grads.loss)
    row_weight, residual, live, reduction, *values = saved_values(ctx)
    own = _BackwardArguments(grads.loss, row_weight, residual, live, reduction)
    return _run_backward(impl, Inputs(*values).for_backward(ctx), own)


_run_backward = define_backward(_BACKWARD, _backward_body, fake_gradients)
_run = define_operation(_NAME, _body, _fake, save=_save, backward=_backward)


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
    num_live: int | None = None,
    main_grad: Tensor | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    process_group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """cross_entropy(z, target, label_smoothing=...) + z_loss * logsumexp(z)^2, times row_weight.

    z = hidden @ weight.T + bias, then softcap * tanh(z / softcap), then / temperature, in float32
    at least (float64 for float64 inputs).

    hidden (..., D), weight (V, D), bias (V,) and target (...) as in linear_logprobs, whose
    num_live, main_grad and DTensors are taken too; row_weight (...) floating, a constant (it must
    not require a gradient). reduction "sum" gives the sum over live rows, "mean" divides it by the
    *number* of live rows, "none" gives (...) losses with 0 in ignored rows. Nats, float32 (float64
    for float64 inputs). Without a live row the loss and every gradient are 0. Rows with
    ignore_index are never read. Differentiable once in hidden, weight and bias, each on its own.

    workspace_bytes: bound on the temporary memory. Where a chunk of logits (and on a GPU, unless
    that holds all rows, a float32 sum of the weight gradient) fits, "mean" and "sum" make their
    gradients in forward: three products; otherwise, and always for "none", with skip_mass or a
    vocab_group, backward makes the logits again: four. None is the backend's own bound; see
    kernels/README.md.

    skip_mass, skip_report: as in linear_logprobs; the bound there holds without label smoothing,
    and with z-loss for the sum of the two upstream gradients.

    vocab_group: as in linear_logprobs.

    ValueError: a bad shape, dtype, device, option, an `impl` that is not available, or a target
    out of range (naming the row; on CUDA that check shares the operator's one synchronisation).
    NotImplementedError: a second derivative.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")
    options = pack_options(
        temperature=temperature,
        softcap=softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        skip_mass=skip_mass,
    )
    call = prepare(
        *(_NAME, hidden, weight, bias, target, options),
        ignore_index=ignore_index,
        num_live=num_live,
        main_grad=main_grad,
        vocab_group=vocab_group,
        process_group=process_group,
        impl=impl,
    )
    weights = call.optional_rows("row_weight", row_weight, may_require_grad=False)
    check_workspace(workspace_bytes)
    skips = may_be_nonzero(skip_mass)
    in_forward = reduction != "none" and not skips
    in_forward = in_forward and made_in_forward(call.impl, call.inputs, workspace_bytes)
    own = _Arguments(weights, reduction, skips, workspace_bytes, in_forward, owned=True)
    results = _run(call.impl, call.inputs, own)
    if skip_report is not None:
        skip_report.mass = call.shaped(results.skipped)
    return call.shaped(results.loss) if reduction == "none" else results.loss
