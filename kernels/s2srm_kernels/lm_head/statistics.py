"""Statistics of every live row's logits in one pass over the vocabulary, merged over ranks.

The monoid is (max, sum e^(z-max), sum e^(z-max) (z-max), z_target, argmax, sum (z-max), #{z >
z_target}). Everything is kept relative to the row's maximum, so a large common offset of the logits
costs nothing, and the maximum's own term of the sum, which is 1, is left out of it: log1p of the
rest keeps the digits of a confident row, whose rest is small.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import torch
from torch import Tensor

from s2srm_kernels.checks import compute_dtype
from s2srm_kernels.lm_head.engine import FLOOR, Engine, RowStatistics, Wanted, widened
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.shards import all_gather, all_reduce_max_

# The fields that a backward needs, kept between the two.
_RESIDUAL = ("max_logit", "log_sum", "log_sum_low", "expected_shift", "target_logit")


def row_statistics(
    engine: Engine, head: Head, wanted: Wanted, *, rank: bool = False, tiles: bool = False
) -> tuple[RowStatistics, Tensor | None]:
    """Statistics of all live rows and, with `tiles`, the (R, T) lse of this rank's tiles.

    One product; with a group one all-gather of (R, 9) values, and with `rank` an all-reduce of the
    targets' logits before it, since no rank can count before it knows them.
    """
    target_logits = None
    if rank:
        target_logits = all_reduce_max_(engine.target_logits(head), head.shard)
    packed, tile_lse = engine.statistics(head, target_logits, tiles, wanted)
    return merge(packed, head), tile_lse


def residual_of(statistics: RowStatistics) -> Tensor:
    """(R, len(_RESIDUAL)) of what a backward needs."""
    return torch.stack([getattr(statistics, field) for field in _RESIDUAL], dim=1)


def statistics_of(residual: Tensor, head: Head) -> RowStatistics:
    """(N, ...) residual -> statistics of the live rows; zeros in the fields that it lacks."""
    zero = torch.zeros(head.num_live, dtype=head.dtype, device=head.rows.device)
    lacking = RowStatistics(*(zero for _ in RowStatistics._fields))
    fields = dict(zip(_RESIDUAL, residual[head.rows].unbind(dim=1), strict=True))
    return lacking._replace(argmax=zero.long(), above=zero.long(), **fields)


def fake_residual(hidden: Tensor) -> Tensor:
    """Shape and dtype of a residual, scattered to all rows."""
    return hidden.new_empty((hidden.shape[0], len(_RESIDUAL)), dtype=compute_dtype(hidden))


def merge(packed: Tensor, head: Head) -> RowStatistics:
    """(r, 7) statistics of this rank -> those of the whole vocabulary, merged in rank order."""
    if head.shard.group is None:
        return _unpack(packed, head)
    offset = packed.new_tensor([head.shard.offset, head.shard.num_local])
    parts = all_gather(torch.cat([packed, offset.expand(len(packed), 2)], dim=1), head.shard.group)
    maxima, rests, weighted, shifts, targets, argmaxes, above, offsets, sizes = parts.unbind(dim=2)
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
            above.sum(dim=0),
        ],
        dim=1,
    )
    return _unpack(merged, head)


def _unpack(packed: Tensor, head: Head) -> RowStatistics:
    max_logit, rest, sum_exp_shift, sum_shift, target_logit, argmax, above = packed.unbind(dim=1)
    wide_rest, dtype = widened(rest), packed.dtype
    wide_log_sum = wide_rest.log1p()
    log_sum = wide_log_sum.to(dtype)
    return RowStatistics(
        max_logit=max_logit,
        log_sum=log_sum,
        log_sum_low=(wide_log_sum - log_sum).to(dtype),
        expected_shift=(sum_exp_shift / (wide_rest + 1)).to(dtype),
        mean_shift=sum_shift / head.shard.num_total,
        target_logit=target_logit,
        argmax=argmax.long(),
        above=above.long(),
    )
