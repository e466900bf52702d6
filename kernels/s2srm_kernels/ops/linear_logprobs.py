"""Log-probability, entropy and log-sum-exp of every row, differentiable in all three.

    z = logits(hidden, weight)                      lse = log sum_v e^(z_v)
    logprobs = z_target - lse                       entropy = -sum_v p_v log p_v,  p = e^(z - lse)

Backward makes the logits again, in chunks whose size the backend bounds; the gradient
of each output is written out in lm_head.backward. Source: the recomputation is that of Cut
Cross-Entropy (arXiv 2411.09009), without its filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor

from s2srm_kernels.checks import (
    autocast_inputs,
    check_head,
    check_tensors,
    check_whole,
    compute_dtype,
)
from s2srm_kernels.dispatch import define_vocabulary, operator, refuse_second_order, select
from s2srm_kernels.lm_head.backward import recompute_gradients
from s2srm_kernels.lm_head.engine import Engine, ThreeGradients, Upstream, Wanted
from s2srm_kernels.lm_head.extra_ids import (
    check_extra_ids,
    extra_fact,
    extra_logprobs,
    extra_upstream,
    live_ids,
)
from s2srm_kernels.lm_head.gradients_in_forward import fake_gradients, wanted_gradients
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.shards import group_name
from s2srm_kernels.lm_head.skipping import SkipReport, fake_plan, statistics_and_plan
from s2srm_kernels.lm_head.statistics import fake_residual, residual_of, statistics_of
from s2srm_kernels.options import Number, may_be_nonzero, pack_options, unpack_options

_NAME = "linear_logprobs"
_BACKWARD = "linear_logprobs_backward"
_OPTIONS = ("temperature", "softcap", "skip_mass")


class Logprobs(NamedTuple):
    """(N,) each, float32 (float64 for float64 inputs), nats; 0 in ignored rows."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor


class LogprobsAtIds(NamedTuple):
    """`Logprobs`, and extra_logprobs (N, K): log p of each row's extra ids, 0 at padding."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    extra_logprobs: Tensor


def _body(
    engine: Engine,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: Tensor,
    extra_ids: Tensor | None,
    with_entropy: bool,
    skips: bool,
    ignore_index: int,
    group: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    temperature, softcap, skip_mass = unpack_options(options, *_OPTIONS)
    facts: dict[str, Any] = {"operation": _NAME, "with_entropy": with_entropy}
    facts |= {"skip_mass": skip_mass, "which inputs need gradients": list(needs)}
    facts |= extra_fact(extra_ids, group)
    head = Head(hidden, weight, bias, target, softcap, temperature, ignore_index, group, **facts)
    wanted = Wanted(maximum=False, entropy=with_entropy, mean=False)
    ids = (
        head.target.new_empty(head.num_live, 0) if extra_ids is None else live_ids(extra_ids, head)
    )
    stats, live, skipped = statistics_and_plan(
        engine, head, skip_mass if skips else None, wanted, head.columns_of(ids)
    )
    extra = extra_logprobs(engine, head, ids, stats)
    entropy = stats.entropy if with_entropy else torch.zeros_like(stats.entropy)
    return (
        head.scatter(stats.logprobs),
        head.scatter(entropy),
        head.scatter(stats.lse),
        head.scatter(residual_of(stats)),
        live,
        head.scatter(skipped),
        head.scatter(extra),
    )


def _backward_body(
    engine: Engine,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: Tensor,
    residual: Tensor,
    live: Tensor,
    ignore_index: int,
    group: str | None,
    needs: Sequence[bool],
    grad_extra: Tensor | None = None,
    extra_ids: Tensor | None = None,
    logprobs_at_ids: Tensor | None = None,
) -> ThreeGradients:
    temperature, softcap = unpack_options(options, *_OPTIONS[:2])  # the PPO loss has others
    facts = {"operation": _BACKWARD, "which inputs need gradients": list(needs)}
    head = Head(hidden, weight, bias, target, softcap, temperature, ignore_index, group, **facts)
    upstream = Upstream(
        logprobs=grad_logprobs[head.rows].to(head.dtype),
        entropy=head.live(grad_entropy),
        lse=head.live(grad_lse),
    )
    stats = statistics_of(residual, head)
    entries = None
    if grad_extra is not None and extra_ids is not None and logprobs_at_ids is not None:
        upstream, entries = extra_upstream(
            head, stats, upstream, extra_ids, logprobs_at_ids, grad_extra
        )
    blocks = live if live.numel() else None
    return recompute_gradients(engine, head, stats, upstream, needs, blocks, entries)


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    n, dtype = hidden.shape[0], compute_dtype(hidden)
    logprobs, entropy, lse, skipped = (hidden.new_empty(n, dtype=dtype) for _ in range(4))
    _, extra_ids, _, skips, *_ = rest
    live = fake_plan(hidden, weight, skips)
    extra = hidden.new_empty((n, 0 if extra_ids is None else extra_ids.shape[1]), dtype=dtype)
    return logprobs, entropy, lse, fake_residual(hidden), live, skipped, extra


def _backward_fake(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: Tensor,
    residual: Tensor,
    live: Tensor,
    ignore_index: int,
    group: str | None,
    needs: Sequence[bool],
    *extra: Any,
) -> ThreeGradients:
    return fake_gradients(hidden, weight, needs, hidden.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, with_entropy, _, ignore_index, group, _ = inputs
    *_, residual, live, skipped, extra = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(residual, live, skipped)
    ctx.save_for_backward(*tensors, residual, live, extra)
    ctx.with_entropy = with_entropy
    ctx.options = (ignore_index, group)


def _backward(impl: str, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logprobs, grad_entropy, grad_lse, *_, grad_extra = grads
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    # Once: a checkpoint gives them out no second time.
    *inputs, extra_ids, residual, live, extra = ctx.saved_tensors
    if grad_logprobs is None:
        grad_logprobs = residual.new_zeros(residual.shape[0])
    gradients = operator(_BACKWARD, impl)(
        *(grad_logprobs, grad_entropy if ctx.with_entropy else None, grad_lse),
        *(*inputs, residual, live, *ctx.options, needs, grad_extra, extra_ids, extra),
    )
    made = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return (*made, *[None] * 8)


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor options"

define_vocabulary(
    _BACKWARD,
    f"(Tensor grad_logprobs, Tensor? grad_entropy, Tensor? grad_lse, {_HEAD}, Tensor residual,"
    " Tensor live, int ignore_index, str? group, bool[] needs, Tensor? grad_extra=None,"
    " Tensor? extra_ids=None, Tensor? extra_logprobs=None) -> (Tensor, Tensor, Tensor)",
    _backward_body,
    _backward_fake,
    backward=refuse_second_order(_BACKWARD),
)
define_vocabulary(
    _NAME,
    f"({_HEAD}, Tensor? extra_ids, bool with_entropy, bool skips, int ignore_index, str? group,"
    " bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _body,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


class _Keywords(TypedDict, total=False):
    bias: Tensor | None
    softcap: Number | None
    temperature: Number
    ignore_index: int
    with_entropy: bool
    skip_mass: Number
    skip_report: SkipReport | None
    process_group: dist.ProcessGroup | None
    impl: str


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
    process_group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> Logprobs | LogprobsAtIds:
    """log_softmax(z)[target], its entropy and logsumexp(z), z the logits of `hidden`.

    z = hidden @ weight.T + bias, then softcap * tanh(z / softcap), then / temperature, in float32
    at least (float64 for float64 inputs).

    hidden (N, D) and weight (V, D), bias (V,) of one floating dtype (under autocast they are cast
    to its dtype); target (N,) int64 or int32. Results are (N,), nats; a row with ignore_index gives
    0 three times, gets no gradient, and its hidden row is never read. A bias of -inf suppresses a
    token. Differentiable once in hidden, weight and bias through all three results; without
    `with_entropy` the entropy is zeros and carries no gradient.

    extra_ids (N, K) int64 or int32: K more ids for each row, any of them twice or the target, -1
    for none. The result is then a LogprobsAtIds with extra_logprobs (N, K), log_softmax(z) at them,
    0 at -1 and in ignored rows, whose ids are never read; differentiable as the rest is. They cost
    no further pass over the vocabulary: K dot products a row (with `triton` tiles of 128 rows and
    as many columns; the reference makes its logits again).

    Four products, one forward and three backward. Memory: see kernels/README.md. A row's results
    are the same bits in any batch.

    skip_mass: backward may leave out blocks of 128 live rows and 256 columns as long as no row
    loses more than this much of its softmax mass and no target lies in them; 0 is exact. The error
    of a row's hidden gradient is at most |grad_logprobs| * mass * max_v |W_v| (the gradients of
    entropy and lse lose the same blocks). skip_report is told the mass that each row does lose.

    process_group: every rank passes the same rows and its contiguous slice of `weight` and `bias`
    in rank order (slices may differ in size); targets are ids of the whole vocabulary. Forward
    makes one all-gather of statistics (and one of the slice sizes), backward all-reduces the hidden
    gradient. The operator is opaque to torch.compile, collectives included.

    ValueError: a bad shape, dtype, device, option, an `impl` that is not available, or a target
    or extra id out of range (naming the row; on CUDA the targets' check shares the operator's one
    synchronisation, that of extra_ids is another).
    NotImplementedError: a second derivative.
    """
    check_tensors(_NAME, hidden=hidden, weight=weight, bias=bias, target=target)
    options = pack_options(temperature=temperature, softcap=softcap, skip_mass=skip_mass)
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    check_head(hidden, weight, bias, target)
    check_whole("ignore_index", ignore_index)
    if extra_ids is not None:
        check_tensors(_NAME, extra_ids=extra_ids)
        check_extra_ids(extra_ids, hidden)
    op = select(_NAME, impl, hidden.device)
    logprobs, entropy, lse, _, _, skipped, extra = op(
        *(hidden, weight, bias, target, options, extra_ids, with_entropy),
        may_be_nonzero(skip_mass),
        *(ignore_index, group_name(process_group), wanted_gradients(hidden, weight, bias)),
    )
    if skip_report is not None:
        skip_report.mass = skipped
    entropy = entropy if with_entropy else entropy.detach()
    if extra_ids is None:
        return Logprobs(logprobs, entropy, lse)
    return LogprobsAtIds(logprobs, entropy, lse, extra)
