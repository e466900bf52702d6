"""Log-probability, entropy and log-sum-exp of every row, differentiable in all three.

    z = logits(hidden, weight)                      lse = log sum_v e^(z_v)
    logprobs = z_target - lse                       entropy = -sum_v p_v log p_v,  p = e^(z - lse)

Backward makes the logits again, in chunks whose size the backend bounds; the gradient
of each output is written out in lm_head.backward. Source: the recomputation is that of Cut
Cross-Entropy (arXiv 2411.09009), without its filter.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor

from s2srm_kernels.checks import compute_dtype
from s2srm_kernels.lm_head.backward import recompute_gradients
from s2srm_kernels.lm_head.call import HeadKeywords, prepare
from s2srm_kernels.lm_head.engine import Engine, ThreeGradients, Upstream, Wanted
from s2srm_kernels.lm_head.extra_ids import (
    extra_fact,
    extra_logprobs,
    extra_upstream,
    flat_ids,
    live_ids,
)
from s2srm_kernels.lm_head.gradients_in_forward import fake_gradients
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

_NAME = "linear_logprobs"
_BACKWARD = "linear_logprobs_backward"


class Logprobs(NamedTuple):
    """(...) each, float32 (float64 for float64 inputs), nats; 0 in ignored rows."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor


class LogprobsAtIds(NamedTuple):
    """`Logprobs`, and extra_logprobs (..., K): log p of each row's extra ids, 0 at padding."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    extra_logprobs: Tensor


class _Arguments(NamedTuple):
    extra_ids: Tensor | None
    with_entropy: bool
    skips: bool


class _Results(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    residual: Tensor
    live: Tensor
    skipped: Tensor
    extra_logprobs: Tensor


class BackwardArguments(NamedTuple):
    """Upstream gradients (N,), (N, K) of the extra ids', and what the forward left."""

    grad_logprobs: Tensor
    grad_entropy: Tensor | None
    grad_lse: Tensor | None
    residual: Tensor
    live: Tensor
    grad_extra: Tensor | None = None
    extra_ids: Tensor | None = None
    extra_logprobs: Tensor | None = None


def _body(engine: Engine, inputs: Inputs, own: _Arguments) -> _Results:
    facts = {"with_entropy": own.with_entropy, **extra_fact(own.extra_ids, inputs.group)}
    head, (skip_mass,) = inputs.open(_NAME, "skip_mass", **facts)
    wanted = Wanted(maximum=False, entropy=own.with_entropy, mean=False)
    ids = live_ids(own.extra_ids, head)
    stats, live, skipped = statistics_and_plan(
        engine, head, skip_mass if own.skips else None, wanted, head.columns_of(ids)
    )
    extra = extra_logprobs(engine, head, ids, stats)
    entropy = stats.entropy if own.with_entropy else torch.zeros_like(stats.entropy)
    return _Results(
        logprobs=head.scatter(stats.logprobs),
        entropy=head.scatter(entropy),
        lse=head.scatter(stats.lse),
        residual=head.scatter(residual_of(stats)),
        live=live,
        skipped=head.scatter(skipped),
        extra_logprobs=head.scatter(extra),
    )


def _fake(inputs: Inputs, own: _Arguments) -> _Results:
    hidden, dtype = inputs.hidden, compute_dtype(inputs.hidden)
    n = hidden.shape[0]
    logprobs, entropy, lse, skipped = (hidden.new_empty(n, dtype=dtype) for _ in range(4))
    num_ids = 0 if own.extra_ids is None else own.extra_ids.shape[1]
    extra = hidden.new_empty((n, num_ids), dtype=dtype)
    live = fake_plan(hidden, inputs.weight, own.skips)
    return _Results(logprobs, entropy, lse, fake_residual(hidden), live, skipped, extra)


def _backward_body(engine: Engine, inputs: Inputs, own: BackwardArguments) -> Gradients:
    head, _ = inputs.open(_BACKWARD)
    upstream = Upstream(
        logprobs=own.grad_logprobs[head.rows].to(head.dtype),
        entropy=head.live(own.grad_entropy),
        lse=head.live(own.grad_lse),
    )
    stats = statistics_of(own.residual, head)
    ids, logprobs, grads = own.extra_ids, own.extra_logprobs, own.grad_extra
    entries = None
    if ids is not None and logprobs is not None and grads is not None:
        upstream, entries = extra_upstream(head, stats, upstream, ids, logprobs, grads)
    live = own.live if own.live.numel() else None
    made = recompute_gradients(engine, head, stats, upstream, inputs.needs, live, entries)
    return Gradients(*made)


def _save(ctx: Any, inputs: Inputs, own: _Arguments, results: _Results) -> None:
    ctx.mark_non_differentiable(results.residual, results.live, results.skipped)
    extra = (own.extra_ids, results.extra_logprobs)
    save_values(ctx, own.with_entropy, results.residual, results.live, *extra, *inputs)


def _backward(impl: str, ctx: Any, grads: Any) -> ThreeGradients:
    with_entropy, residual, live, ids, extra, *values = saved_values(ctx)
    grad_logprobs = grads.logprobs
    if grad_logprobs is None:
        grad_logprobs = residual.new_zeros(residual.shape[0])
    entropy = grads.entropy if with_entropy else None
    arguments = (grad_logprobs, entropy, grads.lse, residual, live, grads.extra_logprobs)
    inputs = Inputs(*values).for_backward(ctx)
    return run_backward(impl, inputs, BackwardArguments(*arguments, ids, extra))


run_backward = define_backward(_BACKWARD, _backward_body, fake_gradients)
_run = define_operation(_NAME, _body, _fake, save=_save, backward=_backward)


class _Keywords(HeadKeywords, total=False):
    with_entropy: bool
    skip_mass: Number
    skip_report: SkipReport | None
    main_grad: Tensor | None


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    extra_ids: None = None,
    **keywords: Unpack[_Keywords],
) -> Logprobs: ...
@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    extra_ids: Tensor,
    **keywords: Unpack[_Keywords],
) -> LogprobsAtIds: ...
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: Number | None = None,
    temperature: Number = 1.0,
    ignore_index: int = -100,
    extra_ids: Tensor | None = None,
    with_entropy: bool = True,
    skip_mass: Number = 0.0,
    skip_report: SkipReport | None = None,
    num_live: int | None = None,
    main_grad: Tensor | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    process_group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> Logprobs | LogprobsAtIds:
    """log_softmax(z)[target], its entropy and logsumexp(z), z the logits of `hidden`.

    z = hidden @ weight.T + bias, then softcap * tanh(z / softcap), then / temperature, in float32
    at least (float64 for float64 inputs).

    hidden (..., D), rows of any leading shape, weight (V, D), bias (V,) of one floating dtype
    (under autocast they are cast to its dtype); a 16-bit hidden with a float32 weight and bias is
    computed as hidden.float() is, and its gradient is 16 bits wide. target (...) int64 or int32.
    Results are (...), nats; a row with ignore_index gives 0 three times, gets no gradient, and its
    hidden row is never read. A bias of -inf suppresses a token. Differentiable once in hidden,
    weight and bias through all three results, each gradient in its input's dtype; without
    `with_entropy` the entropy is zeros and carries no gradient.

    num_live: the number of rows whose target is not ignore_index, where the caller knows it: the
    operator then waits for nothing on CUDA, so that a CUDA graph can hold the call, and a wrong
    number or a target out of range is a device-side assertion there (ValueError on the CPU).

    A weight (and bias) that is a DTensor, as FSDP2's is, is gathered for the call, and its gradient
    is the sum over the ranks, of the DTensor's placement; each rank passes its own rows.

    main_grad (V, D): a floating buffer that the weight's gradient is added to in backward, in its
    own dtype, while autograd gets none for the weight (no .grad, no hook): Megatron's
    weight.main_grad. The gradient is rounded to the weight's dtype once before it is added.

    extra_ids (..., K) int64 or int32: K more ids for each row, any of them twice or the target, -1
    for none. The result is then a LogprobsAtIds with extra_logprobs (..., K), log_softmax(z) at
    them, 0 at -1 and in ignored rows, whose ids are never read; differentiable as the rest is. They
    cost no further pass over the vocabulary: K dot products a row (with `triton` tiles of 128 rows
    and as many columns; the reference makes its logits again).

    Four products, one forward and three backward. Memory: see kernels/README.md. A row's results
    are the same bits in any batch.

    skip_mass: backward may leave out blocks of 128 live rows and 256 columns as long as no row
    loses more than this much of its softmax mass and no target lies in them; 0 is exact. The error
    of a row's hidden gradient is at most |grad_logprobs| * mass * max_v |W_v| (the gradients of
    entropy and lse lose the same blocks). skip_report is told the mass that each row does lose.

    vocab_group (process_group is another name of it): every rank passes the same rows and its
    contiguous slice of `weight` and `bias` in rank order (slices may differ in size); targets are
    ids of the whole vocabulary. Forward makes one all-gather of statistics (and one of the slice
    sizes), backward all-reduces the hidden gradient. The operator is opaque to torch.compile,
    collectives included.

    ValueError: a bad shape, dtype, device, option, an `impl` that is not available, or a target
    or extra id out of range (naming the row; on CUDA the targets' check shares the operator's one
    synchronisation, that of extra_ids is another).
    NotImplementedError: a second derivative.
    """
    options = pack_options(temperature=temperature, softcap=softcap, skip_mass=skip_mass)
    call = prepare(
        *(_NAME, hidden, weight, bias, target, options),
        ignore_index=ignore_index,
        num_live=num_live,
        main_grad=main_grad,
        vocab_group=vocab_group,
        process_group=process_group,
        impl=impl,
    )
    ids = flat_ids(call, extra_ids)
    own = _Arguments(ids, with_entropy, may_be_nonzero(skip_mass))
    results = _run(call.impl, call.inputs, own)
    if skip_report is not None:
        skip_report.mass = call.shaped(results.skipped)
    entropy = results.entropy if with_entropy else results.entropy.detach()
    plain = Logprobs(*map(call.shaped, (results.logprobs, entropy, results.lse)))
    if extra_ids is None:
        return plain
    return LogprobsAtIds(*plain, call.shaped(results.extra_logprobs))
