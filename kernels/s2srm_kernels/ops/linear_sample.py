"""The next token of every row, drawn straight from hidden states and the LM head, with its logprob.

    z = logits(hidden, weight)
    token = argmax over the ids v that are not suppressed of z_v + noise(seed, position, v)
    logprob = z_token - log sum_v e^(z_v)               over the whole vocabulary

with standard Gumbel noise, so that token comes from softmax(z) restricted to those ids. The noise
is a function of its three keys (see lm_head.noise): nothing is kept between calls, and a row draws
the same token in any batch. Source: Gumbel-max inside the product of the head, one maximum for each
tile of columns, is FlashSampling's (arXiv 2603.15854).

Left out: top-k, top-p and every other cut of the distribution, because the logprob of the training
forward would then not be that of the draw.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from s2srm_kernels.checks import (
    check_integer,
    check_rows,
    check_tensors,
    check_whole,
    compute_dtype,
)
from s2srm_kernels.lm_head.call import prepare
from s2srm_kernels.lm_head.engine import Draws, Engine, Packed, Wanted
from s2srm_kernels.lm_head.head import Head, digest
from s2srm_kernels.lm_head.noise import Noise
from s2srm_kernels.lm_head.operation import Inputs, define_operation
from s2srm_kernels.lm_head.shards import all_gather, all_reduce_
from s2srm_kernels.lm_head.statistics import merge, row_statistics
from s2srm_kernels.options import Number, may_be_nonzero, pack_options

_NAME = "linear_sample"


class Samples(NamedTuple):
    """(B,) each: tokens int64; logprobs float32 (float64 for float64 inputs), nats."""

    tokens: Tensor
    logprobs: Tensor


class _Arguments(NamedTuple):
    seeds: Tensor
    positions: Tensor
    suppress: Tensor | None
    greedy: bool


def _body(engine: Engine, inputs: Inputs, own: _Arguments) -> Samples:
    facts: dict[str, Any] = {"whether temperature is 0": own.greedy}
    suppress = own.suppress
    if inputs.group is not None:
        facts |= {"seeds": digest(own.seeds), "positions": digest(own.positions)}
        if suppress is None or suppress.dtype != torch.bool:
            facts["suppress"] = None if suppress is None else digest(suppress)
    head, _ = inputs.open(_NAME, **facts)
    noise = None if own.greedy else Noise(own.seeds.long(), own.positions.long())
    suppressed = None if suppress is None else _suppressed_columns(suppress, head)
    draws = engine.sample(head, noise, suppressed)
    tokens = _merge_draws(draws, head)
    head = head.retarget(tokens)
    if draws.packed is None:
        stats, _ = row_statistics(engine, head, wanted=Wanted(False, False, False))
        return Samples(tokens, stats.logprobs)
    packed = draws.packed
    target = packed.select(1, Packed.target_logit)
    target.masked_fill_(head.columns < 0, -torch.inf)
    return Samples(tokens, merge(packed, head).logprobs)


def _suppressed_columns(suppress: Tensor, head: Head) -> Tensor:
    """(V,) bool of this rank from a mask or from ids; ValueError if no id is left to draw."""
    shard, suppressed = head.shard, suppress
    if suppress.dtype != torch.bool:
        outside = (suppress < 0) | (suppress >= shard.num_total)
        if outside.any():
            place = int(outside.byte().argmax())
            raise ValueError(
                f"suppress[{place}] is {int(suppress[place])}: not in [0, {shard.num_total})"
            )
        local = suppress.long() - shard.offset
        local = local[(local >= 0) & (local < shard.num_local)]
        suppressed = suppress.new_zeros(shard.num_local, dtype=torch.bool).index_fill_(0, local, 1)
    if all_reduce_((~suppressed).sum(), shard) == 0:
        raise ValueError(f"suppress leaves none of the {shard.num_total} ids to draw")
    return suppressed


def _merge_draws(draws: Draws, head: Head) -> Tensor:
    """Each rank's draws -> (R,) ids drawn from the whole vocabulary."""
    tokens = draws.columns + head.shard.offset
    if head.shard.group is None:
        return tokens
    best = all_gather(torch.stack([draws.perturbed.double(), tokens.double()]), head.shard.group)
    owner = best[:, 0].argmax(dim=0, keepdim=True)  # of equal maxima the first rank, the lowest id
    return best[:, 1].gather(0, owner).squeeze(0).long()


def _fake(inputs: Inputs, own: _Arguments) -> Samples:
    num_rows, dtype = inputs.hidden.shape[0], compute_dtype(inputs.hidden)
    tokens = inputs.hidden.new_empty(num_rows, dtype=torch.int64)
    return Samples(tokens, inputs.hidden.new_empty(num_rows, dtype=dtype))


_run = define_operation(_NAME, _body, _fake)


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: Number | None = None,
    temperature: Number = 1.0,
    suppress: Tensor | Sequence[int] | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    process_group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> Samples:
    """One draw from softmax(z) for every row, and log_softmax(z) at it, z the logits of `hidden`.

    z = hidden @ weight.T + bias, then softcap * tanh(z / softcap), then / temperature, in float32
    at least (float64 for float64 inputs). tokens = argmax(z + Gumbel noise); of equal maxima the
    lowest id.

    hidden (B, D) and weight (V, D), bias (V,) of one floating dtype (under autocast they are cast
    to its dtype). seeds and positions (B,) int64 or int32, any values: a row's noise is a function
    of its seed, its position and the id alone. Give every sequence a seed, and every token of it
    its position. tokens (B,) int64, logprobs (B,). Nothing is differentiable.

    temperature 0 (a number, not a tensor) takes the argmax of z without noise, z at temperature 1.

    suppress: ids that are never drawn, as ids or as a (V,) bool mask, True at them. logprobs stay
    those of the whole vocabulary, which a training forward computes; a bias of -inf takes a token
    out of both.

    One product; neither logits nor noise of size (B, V) are held (reference: both, in chunks). A
    row's token and logprob are the same bits in any batch, and logprobs are the bits of
    linear_logprobs at `tokens` with the same backend. The noise is the same bits on every backend;
    logits differ by rounding between backends, and so does a token whose perturbed logit leads by
    less than that. With logits that differ by at most e, a draw changes with a probability below
    2 e, so below 1e-5 for logits of size 10 in float32.

    vocab_group (process_group is another name of it): every rank passes the same rows, seeds and
    positions, and its contiguous slice of `weight`, `bias` and a mask, in rank order; suppressed
    ids are those of the whole vocabulary. Two all-gathers, one of statistics and one of draws (and
    one of the slice sizes).

    ValueError: a bad shape, dtype, device or option, an `impl` that is not available, a suppressed
    id out of range, or no id left to draw.
    """
    check_tensors(_NAME, hidden=hidden, seeds=seeds, positions=positions)
    greedy = not may_be_nonzero(temperature)
    options = pack_options(temperature=1.0 if greedy else temperature, softcap=softcap)
    for name, values in (("seeds", seeds), ("positions", positions)):
        check_rows(name, values, hidden)
        check_integer(name, values)
    # Every row is live, and none has a target: column 0 stands for it.
    call = prepare(
        *(_NAME, hidden, weight, bias, torch.zeros_like(positions), options),
        ignore_index=-1,
        num_live=positions.numel(),
        vocab_group=vocab_group,
        process_group=process_group,
        impl=impl,
        differentiable=False,
    )
    if suppress is not None:
        suppress = _suppress_tensor(suppress, weight)
    own = _Arguments(seeds.flatten(), positions.flatten(), suppress, greedy)
    return Samples(*map(call.shaped, _run(call.impl, call.inputs, own)))


def _suppress_tensor(suppress: Tensor | Sequence[int], weight: Tensor) -> Tensor | None:
    """A (V,) mask, or ids; None where nothing is suppressed."""
    if not isinstance(suppress, Tensor):
        if len(suppress) == 0:
            return None
        for value in suppress:
            check_whole("an id of suppress", value)
        return torch.tensor([int(value) for value in suppress], device=weight.device)
    check_tensors(_NAME, suppress=suppress)
    if suppress.dim() != 1 or (suppress.dtype == torch.bool and len(suppress) != len(weight)):
        raise ValueError(
            f"suppress must be a ({len(weight)},) bool mask or a list of ids, got shape "
            f"{tuple(suppress.shape)}"
        )
    if suppress.dtype != torch.bool:
        check_integer("suppress", suppress)
    if suppress.device != weight.device:
        raise ValueError(
            f"suppress must be on weight's device {weight.device}, got {suppress.device}"
        )
    return suppress
