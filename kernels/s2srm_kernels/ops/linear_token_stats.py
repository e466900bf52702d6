"""Everything that token rewards need from the logits, in one pass over the vocabulary.

(The reference makes a second pass, for the targets' logits, which the rank is counted against.)

    logprobs, entropy, lse    as in linear_logprobs
    argmax, max_logit         the most likely token (of equal logits the lowest id) and its logit
    target_logit, rank        the target's logit and the number of logits strictly greater

No gradient. Source: the statistics are the monoid of online softmax (Milakov and Gimelshein, arXiv
1805.02867) extended by the entropy's and the argmax's terms.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack, overload

import torch.distributed as dist
from torch import Tensor

from s2srm_kernels.checks import compute_dtype
from s2srm_kernels.lm_head.call import HeadKeywords, prepare
from s2srm_kernels.lm_head.engine import Engine, Wanted
from s2srm_kernels.lm_head.extra_ids import extra_fact, extra_logprobs, flat_ids, live_ids
from s2srm_kernels.lm_head.operation import Inputs, define_operation
from s2srm_kernels.lm_head.statistics import row_statistics
from s2srm_kernels.options import Number, pack_options

_NAME = "linear_token_stats"


class TokenStats(NamedTuple):
    """(...) each; argmax and rank int64, the rest float32 (float64 for float64 inputs).

    Nats; max_logit and target_logit are logits after softcap and temperature. Every field is 0 in
    ignored rows.
    """

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    argmax: Tensor
    max_logit: Tensor
    target_logit: Tensor
    rank: Tensor


class TokenStatsAtIds(NamedTuple):
    """`TokenStats`, and extra_logprobs (..., K): log p of each row's extra ids, 0 at padding."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    argmax: Tensor
    max_logit: Tensor
    target_logit: Tensor
    rank: Tensor
    extra_logprobs: Tensor


class _Arguments(NamedTuple):
    extra_ids: Tensor | None


def _body(engine: Engine, inputs: Inputs, own: _Arguments) -> TokenStatsAtIds:
    head, _ = inputs.open(_NAME, **extra_fact(own.extra_ids, inputs.group))
    ids = live_ids(own.extra_ids, head)
    stats, _ = row_statistics(engine, head, Wanted(mean=False), rank=True)
    results = TokenStatsAtIds(
        logprobs=stats.logprobs,
        entropy=stats.entropy,
        lse=stats.lse,
        argmax=stats.argmax,
        max_logit=stats.max_logit,
        target_logit=stats.target_logit,
        rank=stats.above,
        extra_logprobs=extra_logprobs(engine, head, ids, stats),
    )
    return TokenStatsAtIds(*map(head.scatter, results))


def _fake(inputs: Inputs, own: _Arguments) -> TokenStatsAtIds:
    hidden, dtype = inputs.hidden, compute_dtype(inputs.hidden)
    num_ids = 0 if own.extra_ids is None else own.extra_ids.shape[1]
    rows = TokenStats(*(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in TokenStats._fields))
    rows = rows._replace(argmax=rows.argmax.long(), rank=rows.rank.long())
    return TokenStatsAtIds(*rows, hidden.new_empty((hidden.shape[0], num_ids), dtype=dtype))


_run = define_operation(_NAME, _body, _fake)


@overload
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    extra_ids: None = None,
    **keywords: Unpack[HeadKeywords],
) -> TokenStats: ...
@overload
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    extra_ids: Tensor,
    **keywords: Unpack[HeadKeywords],
) -> TokenStatsAtIds: ...
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: Number | None = None,
    temperature: Number = 1.0,
    ignore_index: int = -100,
    extra_ids: Tensor | None = None,
    num_live: int | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    process_group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> TokenStats | TokenStatsAtIds:
    """log_softmax(z)[target], entropy, logsumexp(z), argmax, max, z[target], #{z > z[target]}.

    z = hidden @ weight.T + bias, then softcap * tanh(z / softcap), then / temperature, in float32
    at least (float64 for float64 inputs).

    hidden (..., D), weight (V, D), bias (V,) and target (...) as in linear_logprobs, whose num_live
    and DTensors are taken too. Every field of a row with ignore_index is 0, and its
    hidden row is never read. Ties of the argmax go to the lowest id, and rank 0 means that no logit
    is greater than the target's. Nothing is differentiable: the inputs are detached.

    extra_ids (..., K): as in linear_logprobs; the result is then a TokenStatsAtIds.

    One product (the reference: two). Memory: see kernels/README.md. A row's results are the same
    bits in any batch.

    vocab_group: as in linear_logprobs, and an all-reduce of the targets' logits before the
    product, since no rank can count before it knows them. argmax and rank are exact up to 2**24.

    ValueError: a bad shape, dtype, device, option, an `impl` that is not available, or a target
    or extra id out of range (naming the row; on CUDA the targets' check shares the operator's one
    synchronisation, that of extra_ids is another).
    """
    options = pack_options(temperature=temperature, softcap=softcap)
    call = prepare(
        *(_NAME, hidden, weight, bias, target, options),
        ignore_index=ignore_index,
        num_live=num_live,
        vocab_group=vocab_group,
        process_group=process_group,
        impl=impl,
        differentiable=False,
    )
    results = _run(call.impl, call.inputs, _Arguments(flat_ids(call, extra_ids)))
    shaped = TokenStatsAtIds(*map(call.shaped, results))
    return TokenStats(*shaped[:-1]) if extra_ids is None else shaped
