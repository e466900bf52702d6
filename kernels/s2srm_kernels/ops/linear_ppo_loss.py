"""Clipped PPO loss on the LM head, its gradients made in the same pass over the vocabulary.

With l = log p(target), r = e^(l - old), A the advantage, d = ref - l and H the entropy,

    loss   = 1/Z sum_i [ -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
                         + kl_coef * (e^d - 1 - d) - entropy_coef * H ]
    dloss/dl = 1/Z ( -r A [unclipped term binds] + kl_coef * (1 - e^d) )
    dloss/dH = -entropy_coef / Z

Where max_log_ratio = b is given, l - old and d are clamped to [-b, b] first, and where that binds
the derivative of their term is 0: one row that is far off cannot make the step infinite, or NaN by
0 * inf. A row's coefficients are known once its statistics are: three products instead of the four
of an autograd graph over recomputed log-probabilities (which remain where the workspace is small).
Source: PPO (arXiv 1707.06347, equation 7), the k3 estimator of J. Schulman
(joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
from s2srm_kernels.dispatch import choose, define_vocabulary, operator
from s2srm_kernels.lm_head.backward import no_gradients
from s2srm_kernels.lm_head.engine import Engine, RowStatistics, Upstream, Wanted
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
from s2srm_kernels.lm_head.statistics import fake_residual, residual_of, row_statistics
from s2srm_kernels.options import Number, may_be_nonzero, pack_options, unpack_options

_NAME = "linear_ppo_loss"
_OPTIONS = (
    *("temperature", "softcap", "clip_low", "clip_high"),
    *("kl_coef", "entropy_coef", "max_log_ratio"),
)


class PPOMetrics(NamedTuple):
    """0-d each, float32 (float64 for float64 inputs), means over live rows; no gradient.

    clip_fraction: rows whose clipped term is the smaller. k1 = mean(l - q) and k3 =
    mean(e^(q - l) - 1 - (q - l)) estimate KL(policy || q), where q is the reference if
    ref_logprobs is given and the old policy if not. entropy: mean, nats. ratio_mean, ratio_max.
    bounded_fraction: rows where max_log_ratio binds; the others are of what it leaves.
    """

    clip_fraction: Tensor
    k1: Tensor
    k3: Tensor
    entropy: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    bounded_fraction: Tensor


class PPOLoss(NamedTuple):
    """(loss, metrics)."""

    loss: Tensor
    metrics: PPOMetrics


class _Rows(NamedTuple):
    """(R,) inputs of the live rows and the scalars of the loss; a bound of inf is none."""

    old: Tensor
    advantages: Tensor
    ref: Tensor | None
    clip_low: float
    clip_high: float
    bound: float

    def bounded(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """(clamped to [-bound, bound], True where that binds)."""
        return difference.clamp(-self.bound, self.bound), difference.abs() > self.bound

    def surrogate(self, logprobs: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(ratio, the clipped objective, where the clipped term is the smaller, where bounded)."""
        log_ratio, binds = self.bounded(logprobs - self.old[rows])
        ratio = log_ratio.exp()
        unclipped = ratio * self.advantages[rows]
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * self.advantages[rows]
        return ratio, torch.minimum(unclipped, clipped), clipped < unclipped, binds


def _body(
    engine: Engine,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    normalizer: Tensor | None,
    options: Tensor,
    with_entropy: bool,
    ignore_index: int,
    group: str | None,
    workspace_bytes: int | None,
    needs: Sequence[bool],
    in_forward: bool,
) -> tuple[Tensor, ...]:
    """(loss, metrics, residual, (N, 2) upstream, d_hidden, d_weight, d_bias).

    in_forward: the gradients are made too. upstream: of log p and entropy, for a backward without.
    """
    values = unpack_options(options, *_OPTIONS)
    temperature, softcap, clip_low, clip_high, kl_coef, entropy_coef, bound = values
    facts = {"operation": _NAME, "which inputs need gradients": list(needs)}
    facts |= {"its options": values[2:], "whether there are ref_logprobs": ref_logprobs is not None}
    head = Head(hidden, weight, bias, target, softcap, temperature, ignore_index, group, **facts)
    old, advantage, ref = (
        t[head.rows].to(head.dtype) if t is not None else None
        for t in (old_logprobs, advantages, ref_logprobs)
    )
    assert old is not None and advantage is not None
    inputs = _Rows(old, advantage, ref, clip_low, clip_high, bound)
    if normalizer is None:
        normalizer = torch.tensor(max(head.num_live, 1))
    scale = 1 / normalizer.to(hidden.device, head.dtype)
    wanted = Wanted(maximum=False, entropy=True, mean=False)

    def upstream_of(stats: RowStatistics, rows: slice) -> Upstream:
        logprobs = stats.logprobs
        ratio, _, clips, binds = inputs.surrogate(logprobs, rows)
        slope = (-ratio * inputs.advantages[rows]).masked_fill(clips | binds, 0)
        if kl_coef and inputs.ref is not None:
            difference, binds = inputs.bounded(inputs.ref[rows] - logprobs)
            slope = slope - kl_coef * torch.expm1(difference).masked_fill(binds, 0)
        entropy = (-entropy_coef * scale).expand_as(slope) if with_entropy else None
        return Upstream(logprobs=slope * scale, entropy=entropy)

    if in_forward and head.num_live > 0:
        stats, gradients = engine.statistics_with_gradients(
            head, upstream_of, needs, workspace_bytes, wanted, proportional=not with_entropy
        )
    else:
        stats, _ = row_statistics(engine, head, wanted)
        gradients = no_gradients(head, needs if in_forward else [False] * 3)
    slope, entropy_slope, *_ = upstream_of(stats, slice(0, head.num_live))
    upstream = [slope, torch.zeros_like(slope) if entropy_slope is None else entropy_slope]
    loss, metrics = _loss_and_metrics(stats, inputs, kl_coef, entropy_coef)
    return (
        *(loss * scale, metrics, head.scatter(residual_of(stats))),
        *(head.scatter(torch.stack(upstream, dim=1)), *keep(gradients, hidden)),
    )


def _loss_and_metrics(
    stats: RowStatistics, inputs: _Rows, kl_coef: float, entropy_coef: float
) -> tuple[Tensor, Tensor]:
    """Sum of the rows' losses, (7,) metrics."""
    logprobs = stats.logprobs
    if logprobs.numel() == 0:
        return logprobs.sum(), logprobs.new_zeros(len(PPOMetrics._fields))
    ratio, objective, clips, bounded = inputs.surrogate(logprobs, slice(0, len(logprobs)))
    difference, binds = inputs.bounded(
        (inputs.old if inputs.ref is None else inputs.ref) - logprobs
    )
    k3 = torch.expm1(difference) - difference
    losses = -objective
    if kl_coef:
        losses = losses + kl_coef * k3
    if entropy_coef:
        losses = losses - entropy_coef * stats.entropy
    means = (clips.to(ratio.dtype), -difference, k3, stats.entropy, ratio)
    fraction = (bounded | binds).to(ratio.dtype).mean()
    return losses.sum(), torch.stack([*(m.mean() for m in means), ratio.max(), fraction])


def _fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = compute_dtype(hidden)
    *_, needs, in_forward = rest
    loss, metrics = hidden.new_empty((), dtype=dtype), hidden.new_empty(7, dtype=dtype)
    upstream = hidden.new_empty((hidden.shape[0], 2), dtype=dtype)
    kept = kept_dtype(hidden.dtype)
    gradients = fake_gradients(hidden, weight, needs if in_forward else [False] * 3, kept)
    return (loss, metrics, fake_residual(hidden), upstream, *gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, options, ctx.with_entropy, ignore_index, group, _, _, ctx.gradients_made = inputs
    if ctx.gradients_made:
        save_gradients(ctx, inputs, output)
        return
    ctx.options = (ignore_index, group)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], options, *output[2:4])


def _backward(impl: str, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_loss = grads[0]
    if grad_loss is None:
        return (None,) * 15
    if ctx.gradients_made:
        made = scale_gradients(impl, ctx, grad_loss)
    else:
        *head, residual, upstream = ctx.saved_tensors
        slope, entropy_slope = (upstream * grad_loss).unbind(dim=1)
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        gradients = operator("linear_logprobs_backward", impl)(
            *(slope, entropy_slope if ctx.with_entropy else None, None, *head, residual),
            *(residual.new_empty((0, 0), dtype=torch.bool), *ctx.options, needs),
        )
        made = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return (*made, *[None] * 12)


define_vocabulary(
    _NAME,
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor old_logprobs,"
    " Tensor advantages, Tensor? ref_logprobs, Tensor? normalizer, Tensor options,"
    " bool with_entropy, int ignore_index, str? group, int? workspace_bytes, bool[] needs,"
    " bool in_forward) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _body,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: Number = 0.2,
    clip_high: Number = 0.2,
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
    process_group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> PPOLoss:
    """sum_i [-min(r A, clip(r) A) + kl_coef k3(policy, reference) - entropy_coef H] / normalizer.

    r = e^(logprob - old_logprobs), clipped to [1 - clip_low, 1 + clip_high]; log-probabilities and
    entropy as in linear_logprobs (same softcap, temperature and precision).

    hidden (N, D) and weight (V, D), bias (V,) of one floating dtype (under autocast they are cast
    to its dtype); target (N,) int64 or int32; old_logprobs, advantages, ref_logprobs (N,) floating,
    nats, constants: no gradient reaches them. normalizer: number or 0-d tensor, by default the
    number of live rows; a trainer passes the count over all ranks and micro-batches. Rows with
    ignore_index are never read; without a live row loss, metrics and gradients are 0. The loss is
    0-d float32 (float64 for float64 inputs), differentiable once in hidden, weight and bias, each
    on its own. Where the clipped term is the smaller its gradient is 0; on a tie the unclipped one
    counts. Metrics: see PPOMetrics.

    max_log_ratio: a bound b in (0, 80] on |logprob - old_logprobs| and |ref_logprobs - logprob|,
    each clamped to [-b, b] before its exponential, with no gradient through that term where it
    binds; an infinite old_logprobs or ref_logprobs is bounded too. None is the formula above as it
    stands: a row beyond 88 overflows float32, and an advantage of 0 then makes the whole loss NaN.
    What is NaN, and an advantage that is not finite, is in the loss with or without a bound.

    workspace_bytes: as in linear_cross_entropy: where a chunk of logits fits, the gradients are
    made in forward (three products), otherwise and with a process_group in backward (four).

    process_group: as in linear_logprobs.

    ValueError: a bad shape, dtype, device, option, kl_coef without ref_logprobs, an `impl` that is
    not available, or a target out of range (naming the row; on CUDA that check shares the
    operator's one synchronisation). NotImplementedError: a second derivative.
    """
    check_tensors(_NAME, hidden=hidden, weight=weight, bias=bias, target=target)
    check_tensors(
        _NAME, old_logprobs=old_logprobs, advantages=advantages, ref_logprobs=ref_logprobs
    )
    options = pack_options(
        temperature=temperature,
        softcap=softcap,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        max_log_ratio=max_log_ratio,
    )
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    check_head(hidden, weight, bias, target)
    check_whole("ignore_index", ignore_index)
    if ref_logprobs is None and may_be_nonzero(kl_coef):
        raise ValueError(f"ref_logprobs must be given when kl_coef is not 0, got {kl_coef}")
    constants = (
        ("old_logprobs", old_logprobs),
        ("advantages", advantages),
        ("ref_logprobs", ref_logprobs),
    )
    for name, tensor in constants:
        if tensor is not None:
            check_rows(name, tensor, hidden)
            check_floating(name, tensor)
    check_workspace(workspace_bytes)
    chosen = choose(_NAME, impl, hidden.device)
    needs = wanted_gradients(hidden, weight, bias)
    in_forward = any(needs) and process_group is None
    in_forward = in_forward and fits_in_forward(chosen, hidden, weight, workspace_bytes)
    loss, metrics, *_ = operator(_NAME, chosen)(
        *(hidden, weight, bias, target, old_logprobs.detach(), advantages.detach()),
        None if ref_logprobs is None else ref_logprobs.detach(),
        *(_normalizer_tensor(normalizer), options, may_be_nonzero(entropy_coef), ignore_index),
        *(group_name(process_group), workspace_bytes, needs, in_forward),
    )
    return PPOLoss(loss, PPOMetrics(*metrics.detach().unbind()))


def _normalizer_tensor(normalizer: Number | None) -> Tensor | None:
    """0-d; of a number on the CPU. A tensor's value is not looked at: that would synchronise."""
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer must be 0-d, got shape {tuple(normalizer.shape)}")
        return normalizer.detach()
    return pack_options(normalizer=normalizer).squeeze(0)
