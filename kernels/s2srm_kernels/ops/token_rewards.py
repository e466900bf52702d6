"""Token rewards of the seq2seq reward model: positive until the response diverges from it.

With agree_t as `divergence` says and k the first t where it is False (T if there is none),

    r_t = +positive  t < k;      -negative  t >= k, not agree_t;      match  t >= k, agree_t

Source: Sequence to Sequence Reward Modeling (arXiv 2409.00162), figure 2, for the two signs; the
match reward and the divergences other than "argmax" are this project's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from s2srm_kernels.checks import (
    check_floating,
    check_integer,
    check_rows,
    check_tensors,
    check_whole,
    compute_dtype,
)
from s2srm_kernels.cu_seqlens import check_cu_seqlens_shape, find_segments
from s2srm_kernels.dispatch import define, schema_of, select
from s2srm_kernels.options import Number, pack_options, unpack_options

_NAME = "token_rewards"
_OPTIONS = ("max_margin", "positive", "negative", "match")
_DIVERGENCES = ("argmax", "rank", "margin")


class TokenRewards(NamedTuple):
    """rewards (N,) float32 (float64 for a float64 signal); divergence_index (B,) int64."""

    rewards: Tensor
    divergence_index: Tensor


def _reference(
    response: Tensor,
    signal: Tensor,
    cu_seqlens: Tensor,
    options: Tensor,
    divergence: str,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    max_margin, positive, negative, match = unpack_options(options, *_OPTIONS)
    start, end, sequence, position, _ = find_segments(cu_seqlens, response.shape[0])
    agree = _agree(response, signal, divergence, top_k, max_margin)
    first = end.scatter_reduce(
        0, sequence, position.where(~agree, response.shape[0]), reduce="amin"
    )
    dtype = compute_dtype(signal)
    after = torch.where(agree, match, -negative).to(dtype)
    return after.where(position >= first[sequence], positive), first - start


def _agree(
    response: Tensor, signal: Tensor, divergence: str, top_k: int, max_margin: float
) -> Tensor:
    if divergence == "argmax":
        return signal == response
    return signal.long() < top_k if divergence == "rank" else signal <= max_margin


def _fake(response: Tensor, signal: Tensor, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rewards = signal.new_empty(signal.shape, dtype=compute_dtype(signal))
    return rewards, cu_seqlens.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.int64)


define(_NAME, schema_of(_reference), _fake, reference=_reference)


def token_rewards(
    response: Tensor,
    signal: Tensor,
    cu_seqlens: Tensor,
    *,
    divergence: str = "argmax",
    top_k: int = 1,
    max_margin: Number = 0.0,
    positive: Number = 1.0,
    negative: Number = 1.0,
    match: Number = 0.0,
    impl: str = "auto",
) -> TokenRewards:
    """Rewards of packed responses and where each first diverges from the reward model.

    response (N,) int64 or int32 token ids; cu_seqlens (B + 1,) int32 or int64, sequences may be
    empty. signal (N,), from linear_token_stats over [prompt; response; separator; response]:

        "argmax"  argmax, integer             agrees where signal == response
        "rank"    rank, integer               agrees where signal < top_k (top_k 1: a maximum)
        "margin"  max_logit - target_logit    agrees where signal <= max_margin; NaN diverges

    divergence_index is local to its sequence: the sequence's length where there is no divergence, 0
    for an empty sequence. positive and negative are magnitudes. Nothing is differentiable.

    ValueError: a bad shape, dtype, device, option, an `impl` that is not available, or cu_seqlens
    that do not start at 0, ascend and end at N (checked in the operator: one synchronisation on
    CUDA).
    """
    if divergence not in _DIVERGENCES:
        raise ValueError(f"divergence must be one of {_DIVERGENCES}, got {divergence!r}")
    check_whole("top_k", top_k)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    check_tensors(_NAME, response=response, signal=signal, cu_seqlens=cu_seqlens)
    options = pack_options(max_margin=max_margin, positive=positive, negative=negative, match=match)
    if response.dim() != 1:
        raise ValueError(f"response must have shape (N,), got {tuple(response.shape)}")
    check_integer("response", response)
    check_rows("signal", signal, response, "response")
    if divergence == "margin":
        check_floating("signal", signal)
    else:
        check_integer("signal", signal)
    check_cu_seqlens_shape(cu_seqlens, response, "response")
    op = select(_NAME, impl, response.device)
    return TokenRewards(*op(response, signal.detach(), cu_seqlens, options, divergence, top_k))
