"""Statistics of every live row's logits in one pass over the vocabulary, merged over ranks.

The monoid is (max, sum e^(z-max), sum e^(z-max) (z-max), z_target, argmax, sum (z-max)). Everything
is kept relative to the row's maximum, so a large common offset of the logits costs nothing, and the
maximum's own term of the sum, which is 1, is left out of it: log1p of the rest keeps the digits of
a confident row, whose rest is small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from s2srm_kernels._head import Head
from s2srm_kernels._shards import all_gather

# exp(-1000) is 0 in float32 and float64, and 0 * -1000 is 0 where 0 * -inf would be NaN: a logit
# of -inf (a suppressed token) has no mass, no entropy and no gradient.
FLOOR = -1000.0


class RowStatistics(NamedTuple):
    """(R,) each, in the compute dtype; argmax is an id of the whole vocabulary.

    log_sum is lse - max_logit; expected_shift is E_p[z - max_logit]; mean_shift is the plain mean
    over the vocabulary of z - max_logit.
    """

    max_logit: Tensor
    log_sum: Tensor
    expected_shift: Tensor
    mean_shift: Tensor
    target_logit: Tensor
    argmax: Tensor

    @property
    def logprobs(self) -> Tensor:
        """log p(target), never above 0."""
        return (self.target_logit - self.max_logit) - self.log_sum

    @property
    def entropy(self) -> Tensor:
        """-sum p log p, nats."""
        return self.log_sum - self.expected_shift

    @property
    def lse(self) -> Tensor:
        """log sum e^z."""
        return self.max_logit + self.log_sum

    @property
    def mean_logprob(self) -> Tensor:
        """Mean over the vocabulary of log p."""
        return self.mean_shift - self.log_sum


def row_statistics(head: Head) -> RowStatistics:
    """Statistics of all live rows: one product; with a group one all-gather of (R, 6) values."""
    if head.num_live == 0:
        return _unpack(head.weight.new_zeros((0, 6)), head)
    packed = torch.cat(
        [pack_chunk(head, head.logits(head.live_hidden(c)), c) for c in head.chunks()]
    )
    return merge(packed, head)


def pack_chunk(head: Head, z: Tensor, chunk: slice) -> Tensor:
    """(P, V) logits -> (r, 6) statistics of the chunk's r rows on this rank."""
    column, owned = head.local_target(chunk)
    argmax = z.argmax(dim=1)  # of equal maxima, the first
    # A shard whose logits are all -inf must not subtract -inf from -inf.
    max_logit = z.gather(1, argmax[:, None]).clamp_(min=torch.finfo(z.dtype).min)
    target_logit = z.gather(1, column[:, None]).squeeze(1).where(owned, -torch.inf)
    shifted = z - max_logit
    sum_shift = shifted.sum(dim=1)
    exponential = shifted.clamp_(min=FLOOR).exp().scatter_(1, argmax[:, None], 0)
    rest = exponential.sum(dim=1)
    sum_exp_shift = exponential.mul_(shifted).sum(dim=1)
    # Ids are exact in float32 up to 2**24 columns on a rank.
    columns = (max_logit.squeeze(1), rest, sum_exp_shift, sum_shift, target_logit, argmax)
    return torch.stack([c.to(z.dtype) for c in columns], dim=1)[: chunk.stop - chunk.start]


def merge(packed: Tensor, head: Head) -> RowStatistics:
    """(r, 6) statistics of this rank -> those of the whole vocabulary, merged in rank order."""
    if head.shard.group is None:
        return _unpack(packed, head)
    offset = packed.new_tensor([head.shard.offset, head.shard.num_local])
    parts = all_gather(torch.cat([packed, offset.expand(len(packed), 2)], dim=1), head.shard.group)
    maxima, rests, weighted, shifts, targets, argmaxes, offsets, sizes = parts.unbind(dim=2)
    max_logit, owner = maxima.amax(dim=0), maxima.argmax(dim=0)  # of equal maxima, the first rank
    below = (maxima - max_logit).clamp_(min=FLOOR)
    scale = below.exp()
    others = scale.scatter(0, owner[None], 0)
    merged = torch.stack(
        [
            max_logit,
            (rests * scale + others).sum(dim=0),
            (scale * (weighted + (rests + 1) * below)).sum(dim=0),
            (shifts + sizes * (maxima - max_logit)).sum(dim=0),
            targets.amax(dim=0),
            (argmaxes + offsets).gather(0, owner[None]).squeeze(0),
        ],
        dim=1,
    )
    return _unpack(merged, head)


def _unpack(packed: Tensor, head: Head) -> RowStatistics:
    max_logit, rest, sum_exp_shift, sum_shift, target_logit, argmax = packed.unbind(dim=1)
    return RowStatistics(
        max_logit=max_logit,
        log_sum=rest.log1p(),
        expected_shift=sum_exp_shift / (rest + 1),
        mean_shift=sum_shift / head.shard.num_total,
        target_logit=target_logit,
        argmax=argmax.long(),
    )
