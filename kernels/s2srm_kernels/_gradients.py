"""Gradients of any function of the row statistics, written out in closed form.

With upstream gradients (a) of log p(target), (b) of the entropy H, (c) of the lse and (d) of the
mean log p over the vocabulary, the gradient of the loss with respect to logit j of a row is

    dz_j = a * [j == target] + (c - a - d) * p_j - b * p_j * (log p_j + H) + d / V

then divided by the temperature and multiplied by the softcap's slope 1 - (z_capped / softcap)^2.
The target's entry is formed on its own, with 1 - p as -expm1(log p): a confident target, whose p is
nearly 1, keeps its digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s2srm_kernels._head import Head, matmul_tiles, pad_rows
from s2srm_kernels._shards import all_reduce_
from s2srm_kernels._statistics import FLOOR, RowStatistics, merge, pack_chunk, row_statistics


class Upstream(NamedTuple):
    """(R,) upstream gradient of each row statistic; None is zero."""

    logprobs: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None
    mean_logprob: Tensor | None = None

    def chunk(self, rows: slice) -> Upstream:
        """The same for a slice of the rows, padded with zeros as the logits are."""

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else pad_rows(values[rows])[:, None]

        return Upstream(
            pad_rows(self.logprobs[rows])[:, None],
            cut(self.entropy),
            cut(self.lse),
            cut(self.mean_logprob),
        )


class Gradients:
    """Sums of the gradients over chunks, in the compute dtype; empty where not needed."""

    def __init__(self, head: Head, has_bias: bool, needs: Sequence[bool]) -> None:
        needs_hidden, needs_weight, needs_bias = needs
        self.needs_hidden = needs_hidden
        self.hidden = _buffer(head.hidden, needs_hidden, head.dtype)
        self.weight = _buffer(head.weight, needs_weight, head.dtype)
        self.bias = head.weight.new_zeros(len(head.weight) if has_bias and needs_bias else 0)

    def add(self, head: Head, rows: slice, hidden: Tensor, dz: Tensor) -> None:
        """Add the products of one chunk's (P, V) logit gradients."""
        if self.needs_hidden:
            d_hidden = matmul_tiles(dz, head.weight)[: rows.stop - rows.start]
            self.hidden.index_copy_(0, head.rows[rows], d_hidden)
        if self.weight.numel():
            self.weight.addmm_(dz.t(), hidden)
        if self.bias.numel():
            self.bias += dz.sum(dim=0)

    def finish(self, head: Head) -> tuple[Tensor, Tensor, Tensor]:
        """(d_hidden summed over the ranks' slices of the vocabulary, d_weight, d_bias)."""
        if self.needs_hidden and head.num_live:
            all_reduce_(self.hidden, head.shard)
        return self.hidden, self.weight, self.bias


def recompute_gradients(
    head: Head,
    max_logit: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    upstream: Upstream,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with the logits made again, from the (R,) statistics that forward kept."""
    gradients = Gradients(head, head.bias is not None, needs)
    for rows in head.chunks():
        hidden = head.live_hidden(rows)
        dz = logit_gradients_(
            head,
            head.logits(hidden),
            rows,
            max_logit[rows],
            log_sum[rows],
            None if entropy is None else entropy[rows],
            upstream.chunk(rows),
        )
        gradients.add(head, rows, hidden, dz)
    return gradients.finish(head)


def statistics_with_gradients(
    head: Head, upstream_of: Callable[[RowStatistics, slice], Upstream], needs: Sequence[bool]
) -> tuple[RowStatistics, tuple[Tensor, Tensor, Tensor]]:
    """Statistics of all live rows and the gradients, from upstream_of(statistics, rows).

    On one rank both come from the same logits: three products. With a group the logits are made a
    second time once the statistics are merged, so that there is one all-gather and not one a chunk.
    """
    everything = slice(0, head.num_live)
    if not any(needs) or head.num_live == 0:
        gradients = Gradients(head, head.bias is not None, needs)
        return row_statistics(head), gradients.finish(head)
    if head.shard.group is not None:
        statistics = row_statistics(head)
        upstream = upstream_of(statistics, everything)
        return statistics, recompute_gradients(
            head, statistics.max_logit, statistics.log_sum, statistics.entropy, upstream, needs
        )
    gradients = Gradients(head, head.bias is not None, needs)
    parts: list[RowStatistics] = []
    for rows in head.chunks():
        hidden = head.live_hidden(rows)
        z = head.logits(hidden)
        part = merge(pack_chunk(head, z, rows), head)
        upstream = upstream_of(part, rows).chunk(slice(0, rows.stop - rows.start))
        dz = logit_gradients_(head, z, rows, part.max_logit, part.log_sum, part.entropy, upstream)
        gradients.add(head, rows, hidden, dz)
        parts.append(part)
    merged = RowStatistics(*(torch.cat(field) for field in zip(*parts, strict=True)))
    return merged, gradients.finish(head)


def logit_gradients_(
    head: Head,
    z: Tensor,
    rows: slice,
    max_logit: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    upstream: Upstream,
) -> Tensor:
    """(P, V) logits -> the gradients with respect to hidden @ weight.T + bias. Overwrites z."""
    slope = None
    if head.softcap is not None:
        slope = 1 - (z * (head.temperature / head.softcap)).square_()
    # lse itself is not subtracted: max and log_sum apart keep their digits under a large offset.
    # Padding rows get a maximum of inf, hence p = 0 whatever the bias is.
    logp = z.sub_(pad_rows(max_logit, torch.inf)[:, None]).sub_(pad_rows(log_sum)[:, None])
    column, owned = (t[:, None] for t in head.local_target(rows))
    target_logp = logp.gather(1, column)
    target_p = target_logp.exp()
    coefficient = torch.zeros_like(upstream.logprobs)
    if upstream.lse is not None:
        coefficient = coefficient + upstream.lse
    if upstream.mean_logprob is not None:
        coefficient = coefficient - upstream.mean_logprob
    p = logp.exp()
    if upstream.entropy is None:
        dz = p.mul_(coefficient - upstream.logprobs)
    else:
        assert entropy is not None, "the gradient of the entropy needs its value"
        row_entropy = pad_rows(entropy)[:, None]
        factor = logp.clamp_(min=FLOOR).add_(row_entropy).mul_(-upstream.entropy)
        dz = p.mul_(factor.add_(coefficient - upstream.logprobs))
        target_factor = target_logp.clamp(min=FLOOR) + row_entropy
        coefficient = coefficient - upstream.entropy * target_factor
    at_target = coefficient * target_p - upstream.logprobs * torch.expm1(target_logp)
    dz.scatter_(1, column, at_target.where(owned, dz.gather(1, column)))
    if upstream.mean_logprob is not None:
        dz += upstream.mean_logprob / head.shard.num_total
    if slope is not None:
        dz *= slope
    if head.temperature != 1.0:
        dz /= head.temperature
    return dz


def _buffer(like: Tensor, needed: bool, dtype: torch.dtype) -> Tensor:
    return torch.zeros(like.shape if needed else (0,), dtype=dtype, device=like.device)
