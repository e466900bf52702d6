"""The closed form of the gradients of any function of the row statistics; engines compute it.

With upstream gradients (a) of log p(target), (b) of the entropy H, (c) of the lse and (d) of the
mean log p over the vocabulary, the gradient of the loss with respect to logit j of a row is

    dz_j = a * [j == target] + (c - a - d) * p_j - b * p_j * (log p_j + H) + d / V

then divided by the temperature and multiplied by the softcap's slope 1 - (z_capped / softcap)^2.
The target's entry is formed on its own, with 1 - p as -expm1(log p): a confident target, whose p is
nearly 1, keeps its digits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from s2srm_kernels.lm_head.engine import Engine, Entries, RowStatistics, ThreeGradients, Upstream
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.shards import all_reduce_


def no_gradients(head: Head, needs: Sequence[bool]) -> ThreeGradients:
    """Zeros in the compute dtype, empty where not needed: of a call without a live row."""
    bias = head.weight[:0, 0] if head.bias is None else head.bias
    d_hidden, d_weight, d_bias = (
        t.new_zeros(t.shape if need else (0,), dtype=head.dtype)
        for t, need in zip((head.hidden, head.weight, bias), needs, strict=True)
    )
    return d_hidden, d_weight, d_bias


def scale_on_host_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """`Engine.scale_` where looking at the factor is free, and correct elsewhere."""
    if factor.device.type == "cpu" and float(factor) == 1.0:
        return
    for gradient in gradients:
        gradient.copy_(gradient.to(factor.dtype) * factor)


def set_entries_(dz: Tensor, entries: Entries, rows: slice, first_column: int) -> None:
    """Write the entries of a slice of the live rows to dz (>= r, C), whose columns begin there.

    Nothing waits for the device. An entry of another column is written where one of the row's own
    is, with that one's value, or where there is none the row's first with what it holds.
    """
    local = entries.columns[rows] - first_column
    here = (entries.columns[rows] >= 0) & (local >= 0) & (local < dz.shape[1])
    part = dz[: len(local)]
    some = here.byte().argmax(dim=1, keepdim=True)
    place, values = local.where(here, local.gather(1, some)), entries.values[rows].to(dz.dtype)
    values = values.where(here, values.gather(1, some))
    none = ~here.any(dim=1, keepdim=True)
    part.scatter_(1, place.masked_fill(none, 0), values.where(~none, part[:, :1]))


def recompute_gradients(
    engine: Engine,
    head: Head,
    statistics: RowStatistics,
    upstream: Upstream,
    needs: Sequence[bool],
    live: Tensor | None = None,
    entries: Entries | None = None,
) -> ThreeGradients:
    """Gradients in the inputs' dtype with the logits made again, d_hidden summed over the ranks."""
    if head.num_live == 0:
        d_hidden, d_weight, d_bias = no_gradients(head, needs)
    else:
        d_hidden, d_weight, d_bias = engine.gradients(
            head, statistics, upstream, needs, live, entries
        )
        if needs[0]:
            all_reduce_(d_hidden, head.shard)
    dtype = head.hidden.dtype
    return d_hidden.to(dtype), d_weight.to(dtype), d_bias.to(dtype)
