"""Everything that token rewards need from the logits, in one pass over the vocabulary.

(The reference makes a second pass, for the targets' logits, which the rank is counted against.)

    logprobs, entropy, lse    as in linear_logprobs
    argmax, max_logit         the most likely token (of equal logits the lowest id) and its logit
    target_logit, rank        the target's logit and the number of logits strictly greater

No gradient. Source: the statistics are the monoid of online softmax (Milakov and Gimelshein, arXiv
1805.02867) extended by the entropy's and the argmax's terms.
"""

from __future__ import annotations

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
from s2srm_kernels.dispatch import define_vocabulary, select
from s2srm_kernels.lm_head.engine import Engine, Wanted
from s2srm_kernels.lm_head.extra_ids import (
    check_extra_ids,
    extra_fact,
    extra_logprobs,
    live_ids,
)
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.shards import group_name
from s2srm_kernels.lm_head.statistics import row_statistics
from s2srm_kernels.options import Number, pack_options, unpack_options

_NAME = "linear_token_stats"
_OPTIONS = ("temperature", "softcap")


class TokenStats(NamedTuple):
    """(N,) each; argmax and rank int64, the rest float32 (float64 for float64 inputs).

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
    """`TokenStats`, and extra_logprobs (N, K): log p of each row's extra ids, 0 at padding."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    argmax: Tensor
    max_logit: Tensor
    target_logit: Tensor
    rank: Tensor
    extra_logprobs: Tensor


def _body(
    engine: Engine,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: Tensor,
    extra_ids: Tensor | None,
    ignore_index: int,
    group: str | None,
) -> tuple[Tensor, ...]:
    temperature, softcap = unpack_options(options, *_OPTIONS)
    facts = {"operation": _NAME, **extra_fact(extra_ids, group)}
    head = Head(hidden, weight, bias, target, softcap, temperature, ignore_index, group, **facts)
    ids = (
        head.target.new_empty(head.num_live, 0) if extra_ids is None else live_ids(extra_ids, head)
    )
    stats, _ = row_statistics(engine, head, Wanted(mean=False), rank=True)
    fields = (
        *(stats.logprobs, stats.entropy, stats.lse, stats.argmax),
        *(stats.max_logit, stats.target_logit, stats.above),
        extra_logprobs(engine, head, ids, stats),
    )
    return tuple(head.scatter(field) for field in fields)


def _fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    n, dtype = hidden.shape[0], compute_dtype(hidden)
    dtypes = (dtype, dtype, dtype, torch.int64, dtype, dtype, torch.int64)
    *_, extra_ids, _, _ = rest
    extra = hidden.new_empty((n, 0 if extra_ids is None else extra_ids.shape[1]), dtype=dtype)
    return (*(hidden.new_empty(n, dtype=d) for d in dtypes), extra)


define_vocabulary(
    _NAME,
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor options, Tensor? extra_ids,"
    " int ignore_index, str? group)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _body,
    _fake,
)


class _Keywords(TypedDict, total=False):
    bias: Tensor | None
    softcap: Number | None
    temperature: Number
    ignore_index: int
    process_group: dist.ProcessGroup | None
    impl: str


@overload
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    extra_ids: None = None,
    **keywords: Unpack[_Keywords],
) -> TokenStats: ...
@overload
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    extra_ids: Tensor,
    **keywords: Unpack[_Keywords],
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
    process_group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> TokenStats | TokenStatsAtIds:
    """log_softmax(z)[target], entropy, logsumexp(z), argmax, max, z[target], #{z > z[target]}.

    z = hidden @ weight.T + bias, then softcap * tanh(z / softcap), then / temperature, in float32
    at least (float64 for float64 inputs).

    hidden (N, D) and weight (V, D), bias (V,) of one floating dtype (under autocast they are cast
    to its dtype); target (N,) int64 or int32. Every field of a row with ignore_index is 0, and its
    hidden row is never read. Ties of the argmax go to the lowest id, and rank 0 means that no logit
    is greater than the target's. Nothing is differentiable: the inputs are detached.

    extra_ids (N, K): as in linear_logprobs; the result is then a TokenStatsAtIds with their log p.

    One product (the reference: two). Memory: see kernels/README.md. A row's results are the same
    bits in any batch.

    process_group: as in linear_logprobs, and an all-reduce of the targets' logits before the
    product, since no rank can count before it knows them. argmax and rank are exact up to 2**24.

    ValueError: a bad shape, dtype, device, option, an `impl` that is not available, or a target
    or extra id out of range (naming the row; on CUDA the targets' check shares the operator's one
    synchronisation, that of extra_ids is another).
    """
    check_tensors(_NAME, hidden=hidden, weight=weight, bias=bias, target=target)
    options = pack_options(temperature=temperature, softcap=softcap)
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    check_head(hidden, weight, bias, target)
    check_whole("ignore_index", ignore_index)
    if extra_ids is not None:
        check_tensors(_NAME, extra_ids=extra_ids)
        check_extra_ids(extra_ids, hidden)
    op = select(_NAME, impl, hidden.device)
    *fields, extra = op(
        *(hidden.detach(), weight.detach(), None if bias is None else bias.detach()),
        *(target, options, extra_ids, ignore_index, group_name(process_group)),
    )
    stats = TokenStats(*fields)
    return stats if extra_ids is None else TokenStatsAtIds(*stats, extra)
