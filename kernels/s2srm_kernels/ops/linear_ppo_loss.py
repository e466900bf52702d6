"""Clipped PPO loss on the LM head, its gradients made in the same pass over the vocabulary.

With l = log p(target), r = e^(l - old), A the advantage, d = ref - l and H the entropy,

    loss   = 1/Z sum_i [ -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
                         + kl_coef * (e^d - 1 - d) - entropy_coef * H ]
    dloss/dl = 1/Z ( -r A [unclipped term binds] + kl_coef * (1 - e^d) )
    dloss/dH = -entropy_coef / Z

so a row's coefficients are known once its statistics are: three products instead of the four of an
autograd graph over recomputed log-probabilities. Source: PPO (arXiv 1707.06347, equation 7), the k3
estimator of J. Schulman (joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
from s2srm_kernels._gradients import Upstream, statistics_with_gradients
from s2srm_kernels._head import Head
from s2srm_kernels._operators import define, select
from s2srm_kernels._scaling import (
    fake_gradients,
    needed_gradients,
    save_gradients,
    scale_gradients,
)
from s2srm_kernels._shards import group_name
from s2srm_kernels._statistics import RowStatistics

_NAME = "linear_ppo_loss"


class PPOMetrics(NamedTuple):
    """0-d each, float32 (float64 for float64 inputs), means over live rows; no gradient.

    clip_fraction: rows whose clipped term is the smaller. k1 = mean(l - q) and k3 =
    mean(e^(q - l) - 1 - (q - l)) estimate KL(policy || q), where q is the reference if
    ref_logprobs is given and the old policy if not. entropy: mean, nats. ratio_mean, ratio_max.
    """

    clip_fraction: Tensor
    k1: Tensor
    k3: Tensor
    entropy: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor


class PPOLoss(NamedTuple):
    """(loss, metrics)."""

    loss: Tensor
    metrics: PPOMetrics


class _Rows(NamedTuple):
    """(R,) inputs of the live rows and the scalars of the loss."""

    old: Tensor
    advantages: Tensor
    ref: Tensor | None
    clip_low: float
    clip_high: float

    def surrogate(self, logprobs: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(ratio, the clipped objective, True where the clipped term is the smaller)."""
        ratio = (logprobs - self.old[rows]).exp()
        unclipped = ratio * self.advantages[rows]
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * self.advantages[rows]
        return ratio, torch.minimum(unclipped, clipped), clipped < unclipped


def _reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    normalizer: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    entropy_coef: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    group: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = Head(hidden, weight, bias, target, softcap, temperature, ignore_index, group)
    old, advantage, ref = (
        t[head.rows].to(head.dtype) if t is not None else None
        for t in (old_logprobs, advantages, ref_logprobs)
    )
    assert old is not None and advantage is not None
    inputs = _Rows(old, advantage, ref, clip_low, clip_high)
    if normalizer is None:
        normalizer = head.weight.new_tensor(float(max(head.num_live, 1)))
    scale = 1 / normalizer.to(head.dtype)

    def upstream_of(stats: RowStatistics, rows: slice) -> Upstream:
        logprobs = stats.logprobs
        ratio, _, clips = inputs.surrogate(logprobs, rows)
        slope = (-ratio * inputs.advantages[rows]).masked_fill(clips, 0)
        if kl_coef and inputs.ref is not None:
            slope = slope - kl_coef * torch.expm1(inputs.ref[rows] - logprobs)
        entropy = (-entropy_coef * scale).expand_as(slope) if entropy_coef else None
        return Upstream(logprobs=slope * scale, entropy=entropy)

    stats, gradients = statistics_with_gradients(head, upstream_of, needs)
    loss, metrics = _loss_and_metrics(stats, inputs, kl_coef, entropy_coef)
    return (loss * scale, metrics, *gradients)


def _loss_and_metrics(
    stats: RowStatistics, inputs: _Rows, kl_coef: float, entropy_coef: float
) -> tuple[Tensor, Tensor]:
    """Sum of the rows' losses, (6,) metrics."""
    logprobs = stats.logprobs
    if logprobs.numel() == 0:
        return logprobs.sum(), logprobs.new_zeros(6)
    ratio, objective, clips = inputs.surrogate(logprobs, slice(0, len(logprobs)))
    difference = (inputs.old if inputs.ref is None else inputs.ref) - logprobs
    k3 = torch.expm1(difference) - difference
    losses = -objective
    if kl_coef:
        losses = losses + kl_coef * k3
    if entropy_coef:
        losses = losses - entropy_coef * stats.entropy
    means = (clips.to(ratio.dtype), -difference, k3, stats.entropy, ratio)
    return losses.sum(), torch.stack([*(m.mean() for m in means), ratio.max()])


def _fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = compute_dtype(hidden)
    loss, metrics = hidden.new_empty((), dtype=dtype), hidden.new_empty(6, dtype=dtype)
    return (loss, metrics, *fake_gradients(hidden, weight, rest[-1], dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    save_gradients(ctx, inputs, output)


def _backward(impl: str, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_loss = grads[0]
    if grad_loss is None:
        return (None,) * 17
    return (*scale_gradients(ctx, grad_loss), *[None] * 14)


define(
    _NAME,
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor old_logprobs,"
    " Tensor advantages, Tensor? ref_logprobs, Tensor? normalizer, float clip_low, float clip_high,"
    " float kl_coef, float entropy_coef, float? softcap, float temperature, int ignore_index,"
    " str? group, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference,
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
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
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

    Memory: at most max(128 V, 2**24) logits at a time, the weight upcast, and the needed gradients
    in the compute dtype from forward to backward.

    process_group: as in linear_logprobs; the all-reduce of the hidden gradient is in forward.

    ValueError: a bad shape, dtype, device, option, kl_coef without ref_logprobs, an `impl` that is
    not available, or a target out of range (naming the row; on CUDA that check shares the
    operator's one synchronisation). NotImplementedError: a second derivative.
    """
    check_number("clip_low", clip_low, 0.0)
    check_number("clip_high", clip_high, 0.0)
    check_number("kl_coef", kl_coef, 0.0)
    check_number("entropy_coef", entropy_coef)
    check_head_options(softcap, temperature)
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    check_head(hidden, weight, bias, target)
    if kl_coef > 0 and ref_logprobs is None:
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
    op = select(_NAME, impl, hidden.device)
    loss, metrics, *_ = op(
        *(hidden, weight, bias, target, old_logprobs.detach(), advantages.detach()),
        None if ref_logprobs is None else ref_logprobs.detach(),
        _normalizer_tensor(normalizer, hidden),
        *(clip_low, clip_high, kl_coef, entropy_coef, softcap, temperature, ignore_index),
        group_name(process_group),
        needed_gradients(hidden, weight, bias),
    )
    return PPOLoss(loss, PPOMetrics(*metrics.detach().unbind()))


def _normalizer_tensor(normalizer: float | Tensor | None, hidden: Tensor) -> Tensor | None:
    """A tensor's value is not looked at: that would synchronise."""
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer must be 0-d, got shape {tuple(normalizer.shape)}")
        return normalizer.detach().to(hidden.device)
    check_number("normalizer", normalizer, 0.0, above=True)
    return torch.full((), normalizer, dtype=compute_dtype(hidden), device=hidden.device)
