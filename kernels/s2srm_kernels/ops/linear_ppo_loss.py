"""Clipped PPO loss on the LM head, its gradients made in the same pass over the vocabulary.

With l = log p(target), d = ref - l, H the entropy and w the row weight (1 by default),

    loss   = 1/Z sum_i w_i [ -objective_i + kl_coef * (e^d - 1 - d) - entropy_coef * H ]
    dloss/dl = 1/Z w ( -dobjective/dl + kl_coef * (1 - e^d) );  dloss/dH = -entropy_coef w / Z

where the objective is min(r A, clip(r) A) with r = e^(l - old), or one of the variants that
lm_head.surrogate has the formulas and sources of. Where max_log_ratio = b is given, l - old and d
are clamped to [-b, b] first, and where that binds the derivative of their term is 0: one row that
is far off cannot make the step infinite, or NaN by 0 * inf. A row's coefficients are known once its
statistics are: three products instead of the four of an autograd graph over recomputed
log-probabilities, which remain where the workspace is small and where a ratio is a sequence's.
Source: PPO (arXiv 1707.06347, equation 7), the k3 estimator of J. Schulman
(joschu.net/blog/kl-approx.html).

Left out: estimators of advantages, and means over sequences other than by row_weight and
normalizer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from s2srm_kernels.checks import check_tensors, check_workspace, compute_dtype
from s2srm_kernels.cu_seqlens import check_cu_seqlens_shape
from s2srm_kernels.lm_head.backward import no_gradients
from s2srm_kernels.lm_head.call import prepare
from s2srm_kernels.lm_head.engine import Engine, RowStatistics, Upstream, Wanted
from s2srm_kernels.lm_head.gradients_in_forward import (
    fake_kept_gradients,
    kept_gradients,
    made_in_forward,
    save_gradients,
    scale_gradients,
)
from s2srm_kernels.lm_head.operation import Inputs, define_operation, save_values, saved_values
from s2srm_kernels.lm_head.statistics import fake_residual, residual_of, row_statistics
from s2srm_kernels.lm_head.surrogate import Clip, Surrogate, live_lengths
from s2srm_kernels.ops.linear_logprobs import BackwardArguments, run_backward
from s2srm_kernels.options import Number, may_be_nonzero, pack_options

_NAME = "linear_ppo_loss"
_OPTIONS = (
    *("clip_low", "clip_high", "dual_clip", "max_log_ratio"),
    *("kl_coef", "entropy_coef"),
)
_RATIO_LEVELS = ("token", "sequence")


class PPOMetrics(NamedTuple):
    """0-d each, float32 (float64 for float64 inputs), means over live rows; no gradient.

    clip_fraction: rows whose objective is a clipped term. k1 = mean(l - q) and k3 =
    mean(e^(q - l) - 1 - (q - l)) estimate KL(policy || q), where q is the reference if
    ref_logprobs is given and the old policy if not. entropy: mean, nats, None without with_entropy.
    ratio_mean, ratio_max. bounded_fraction: rows where max_log_ratio binds; the others are of what
    it leaves. Row weights do not enter.
    """

    clip_fraction: Tensor
    k1: Tensor
    k3: Tensor
    entropy: Tensor | None
    ratio_mean: Tensor
    ratio_max: Tensor
    bounded_fraction: Tensor


class PPOLoss(NamedTuple):
    """(loss, metrics)."""

    loss: Tensor
    metrics: PPOMetrics


class _Arguments(NamedTuple):
    """cu_seqlens: given where a ratio is a sequence's. entropy_gradient: entropy_coef may be other
    than 0. in_forward and owned: as in linear_cross_entropy."""

    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None
    row_weight: Tensor | None
    normalizer: Tensor | None
    cu_seqlens: Tensor | None
    with_entropy: bool
    entropy_gradient: bool
    workspace_bytes: int | None
    in_forward: bool
    owned: bool


class _Results(NamedTuple):
    """upstream (N, 2): of log p and entropy, for a backward of its own."""

    loss: Tensor
    metrics: Tensor
    residual: Tensor
    upstream: Tensor
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor


class _Loss(NamedTuple):
    """The loss as a function of the row statistics. scale: number or 0-d, what 1/Z is."""

    surrogate: Surrogate
    ref: Tensor | None
    weight: Tensor
    scale: Tensor | float
    kl_coef: float
    entropy_coef: float
    own: _Arguments

    def upstream(self, stats: RowStatistics, rows: slice) -> Upstream:
        """Derivatives of the loss by the statistics of a slice of the live rows."""
        logprobs, weight = stats.logprobs, self.weight[rows] * self.scale
        slope = -self.surrogate.slope(logprobs, rows, weight)
        if self.kl_coef and self.ref is not None:
            difference, binds = self.surrogate.bounded(self.ref[rows] - logprobs)
            growth = torch.expm1(difference).masked_fill(binds, 0)
            slope = slope - self.kl_coef * weight * growth
        entropy = -self.entropy_coef * weight if self.own.entropy_gradient else None
        return Upstream(logprobs=slope, entropy=entropy)

    def value(self, stats: RowStatistics) -> tuple[Tensor, Tensor]:
        """(0-d loss, the metrics); an entropy that is not wanted is 0."""
        logprobs = stats.logprobs
        if logprobs.numel() == 0:
            return logprobs.sum(), logprobs.new_zeros(len(PPOMetrics._fields))
        terms = self.surrogate.terms(logprobs, slice(0, len(logprobs)))
        other = self.surrogate.old if self.ref is None else self.ref
        difference, binds = self.surrogate.bounded(other - logprobs)
        k3 = torch.expm1(difference) - difference
        losses = -terms.objective
        if self.kl_coef:
            losses = losses + self.kl_coef * k3
        if self.entropy_coef:
            losses = losses - self.entropy_coef * stats.entropy
        entropy = stats.entropy if self.own.with_entropy else torch.zeros_like(k3)
        metrics = PPOMetrics(
            clip_fraction=terms.clips.to(k3.dtype).mean(),
            k1=-difference.mean(),
            k3=k3.mean(),
            entropy=entropy.mean(),
            ratio_mean=terms.ratio.mean(),
            ratio_max=terms.ratio.max(),
            bounded_fraction=(terms.bounded | binds).to(k3.dtype).mean(),
        )
        fields = [field for field in metrics if field is not None]
        return (losses * self.weight).sum() * self.scale, torch.stack(fields)


def _body(engine: Engine, inputs: Inputs, own: _Arguments) -> _Results:
    given = [name for name in _Arguments._fields[2:6] if getattr(own, name) is not None]
    facts = {"which of its inputs are given": given, "with_entropy": own.with_entropy}
    head, values = inputs.open(_NAME, *_OPTIONS, **facts)
    *clip, kl_coef, entropy_coef = values
    lengths = None if own.cu_seqlens is None else live_lengths(own.cu_seqlens, head)
    old, advantages = (t[head.rows].to(head.dtype) for t in (own.old_logprobs, own.advantages))
    weight = head.live(own.row_weight)
    loss = _Loss(
        Surrogate(old, advantages, Clip(*clip), lengths),
        head.live(own.ref_logprobs),
        torch.ones_like(old) if weight is None else weight,
        _inverse(own.normalizer, head.num_live, head.dtype),
        *(kl_coef, entropy_coef, own),
    )
    wanted = Wanted(maximum=False, entropy=own.with_entropy, mean=False)
    if own.in_forward and head.num_live > 0:
        stats, gradients = engine.statistics_with_gradients(
            *(head, loss.upstream, inputs.needs, own.workspace_bytes, wanted),
            proportional=not own.entropy_gradient,
        )
    else:
        stats, _ = row_statistics(engine, head, wanted)
        gradients = no_gradients(head, inputs.needs if own.in_forward else [False] * 3)
    slope, entropy_slope, *_ = loss.upstream(stats, slice(0, head.num_live))
    upstream = [slope, torch.zeros_like(slope) if entropy_slope is None else entropy_slope]
    return _Results(
        *loss.value(stats),
        head.scatter(residual_of(stats)),
        head.scatter(torch.stack(upstream, dim=1)),
        *kept_gradients(gradients, inputs),
    )


def _inverse(normalizer: Tensor | None, num_live: int, dtype: torch.dtype) -> Tensor | float:
    """1 / Z. A number is no tensor of the device: a CUDA graph cannot hold its copy."""
    if normalizer is None:
        return 1 / max(num_live, 1)
    if normalizer.device.type == "cpu":
        return 1 / float(normalizer)
    return 1 / normalizer.to(dtype)


def _fake(inputs: Inputs, own: _Arguments) -> _Results:
    hidden, dtype = inputs.hidden, compute_dtype(inputs.hidden)
    return _Results(
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(len(PPOMetrics._fields), dtype=dtype),
        fake_residual(hidden),
        hidden.new_empty((hidden.shape[0], 2), dtype=dtype),
        *fake_kept_gradients(inputs, own.in_forward),
    )


def _save(ctx: Any, inputs: Inputs, own: _Arguments, results: _Results) -> None:
    ctx.mark_non_differentiable(*results[1:])
    ctx.gradients_made = own.in_forward
    if own.in_forward:
        gradients = (results.d_hidden, results.d_weight, results.d_bias)
        save_gradients(ctx, inputs, gradients, own.owned)
    else:
        save_values(ctx, own.entropy_gradient, results.residual, results.upstream, *inputs)


def _backward(impl: str, ctx: Any, grads: Any) -> tuple[Tensor | None, ...]:
    if grads.loss is None:
        return (None, None, None)
    if ctx.gradients_made:
        return scale_gradients(impl, ctx, grads.loss)
    entropy_gradient, residual, upstream, *values = saved_values(ctx)
    slope, entropy_slope = (upstream * grads.loss).unbind(dim=1)
    no_plan = residual.new_empty((0, 0), dtype=torch.bool)
    entropy = entropy_slope if entropy_gradient else None
    own = BackwardArguments(slope, entropy, None, residual, no_plan)
    return run_backward(impl, Inputs(*values).for_backward(ctx), own)


_run = define_operation(_NAME, _body, _fake, save=_save, backward=_backward)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: Number | None = 0.2,
    clip_high: Number | None = 0.2,
    dual_clip: Number | None = None,
    ratio_level: str = "token",
    cu_seqlens: Tensor | None = None,
    row_weight: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: Number = 0.0,
    entropy_coef: Number = 0.0,
    max_log_ratio: Number | None = None,
    normalizer: Number | None = None,
    bias: Tensor | None = None,
    softcap: Number | None = None,
    temperature: Number = 1.0,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    with_entropy: bool = True,
    num_live: int | None = None,
    main_grad: Tensor | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    process_group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> PPOLoss:
    """sum_i w_i [-objective_i + kl_coef k3(policy, reference) - entropy_coef H] / normalizer.

    objective = min(r A, clip(r) A), r = e^(logprob - old_logprobs), clipped to [1 - clip_low,
    1 + clip_high]; log-probabilities and entropy as in linear_logprobs (same softcap, temperature
    and precision).

    hidden (..., D), weight (V, D), bias (V,) and target (...) as in linear_logprobs, whose
    num_live, main_grad and DTensors are taken too; old_logprobs, advantages, ref_logprobs,
    row_weight (...) floating, nats, constants: no gradient reaches them. normalizer: number or 0-d
    tensor, by default the number of live rows; a trainer passes the count over all ranks and
    micro-batches. Rows with ignore_index are never read; without a live row loss, metrics and
    gradients are 0. The loss is 0-d float32 (float64 for float64 inputs), differentiable once in
    hidden, weight and bias, each on its own. Where the clipped term is the smaller its gradient is
    0; on a tie the unclipped one counts. Metrics: see PPOMetrics.

    row_weight: w, 1 by default; it weights a row's every term, and not the normalizer. With
    w = 1 / (rows of its sequence) and normalizer = B the loss is a mean over sequences of means.

    clip_low, clip_high: None leaves that side unclipped; both, and the objective is r A.

    dual_clip: c > 1. For A < 0 the objective is max(min(r A, clip(r) A), c A): a ratio beyond c
    has no gradient (arXiv 1912.09729).

    ratio_level "sequence" with cu_seqlens (B + 1,), offsets into the rows (of hidden.flatten(0,
    -2)): r = exp(mean over the sequence's live rows of (logprob - old_logprobs)), one ratio for all
    rows of a sequence, as GSPO has it (arXiv 2507.18071). The gradient is that of this formula, for
    advantages that differ within a sequence too. Four products; one more synchronisation on CUDA.

    with_entropy=False saves what the entropy costs: metrics.entropy is None, and entropy_coef must
    be 0.

    max_log_ratio: a bound b in (0, 80] on |logprob - old_logprobs| (or its mean) and
    |ref_logprobs - logprob|, each clamped to [-b, b] before its exponential, with no gradient
    through that term where it binds; an infinite old_logprobs or ref_logprobs is bounded too. None
    is the formula above as it stands: a row beyond 88 overflows float32, and an advantage of 0 then
    makes the whole loss NaN. What is NaN, and an advantage that is not finite, is in the loss with
    or without a bound.

    workspace_bytes: as in linear_cross_entropy: where a chunk of logits fits, the gradients are
    made in forward (three products), otherwise and with a vocab_group in backward (four).

    vocab_group: as in linear_logprobs.

    ValueError: a bad shape, dtype, device, option, kl_coef without ref_logprobs, an `impl` that is
    not available, or a target out of range (naming the row; on CUDA that check shares the
    operator's one synchronisation). NotImplementedError: a second derivative.
    """
    check_tensors(_NAME, old_logprobs=old_logprobs, advantages=advantages)
    if ratio_level not in _RATIO_LEVELS:
        raise ValueError(f"ratio_level must be one of {_RATIO_LEVELS}, got {ratio_level!r}")
    if (ratio_level == "sequence") != (cu_seqlens is not None):
        raise ValueError(
            f"cu_seqlens must be given with ratio_level 'sequence', and with no other, got "
            f"{ratio_level!r} and {'none' if cu_seqlens is None else tuple(cu_seqlens.shape)}"
        )
    entropy_gradient = may_be_nonzero(entropy_coef)
    if entropy_gradient and not with_entropy:
        raise ValueError(f"entropy_coef must be 0 without with_entropy, got {entropy_coef}")
    options = pack_options(
        temperature=temperature,
        softcap=softcap,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        max_log_ratio=max_log_ratio,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
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
    if ref_logprobs is None and may_be_nonzero(kl_coef):
        raise ValueError(f"ref_logprobs must be given when kl_coef is not 0, got {kl_coef}")
    if cu_seqlens is not None:
        check_tensors(_NAME, cu_seqlens=cu_seqlens)
        check_cu_seqlens_shape(cu_seqlens, hidden, "hidden")
    check_workspace(workspace_bytes)
    old, advantage = (
        call.rows(name, rows)
        for name, rows in (("old_logprobs", old_logprobs), ("advantages", advantages))
    )
    in_forward = cu_seqlens is None
    in_forward = in_forward and made_in_forward(call.impl, call.inputs, workspace_bytes)
    own = _Arguments(
        *(old, advantage, call.optional_rows("ref_logprobs", ref_logprobs)),
        call.optional_rows("row_weight", row_weight, may_require_grad=False),
        *(_normalizer_tensor(normalizer), cu_seqlens, with_entropy, entropy_gradient),
        *(workspace_bytes, in_forward, True),
    )
    results = _run(call.impl, call.inputs, own)
    metrics = PPOMetrics(*results.metrics.detach().unbind())
    return PPOLoss(results.loss, metrics if with_entropy else metrics._replace(entropy=None))


def _normalizer_tensor(normalizer: Number | None) -> Tensor | None:
    """0-d; of a number on the CPU. A tensor's value is not looked at: that would synchronise."""
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer must be 0-d, got shape {tuple(normalizer.shape)}")
        return normalizer.detach()
    return pack_options(normalizer=normalizer).squeeze(0)
