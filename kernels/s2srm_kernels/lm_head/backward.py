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

from s2srm_kernels.lm_head.engine import Engine, RowStatistics, ThreeGradients, Upstream
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


def recompute_gradients(
    engine: Engine,
    head: Head,
    statistics: RowStatistics,
    upstream: Upstream,
    needs: Sequence[bool],
    live: Tensor | None = None,
) -> ThreeGradients:
    """Gradients in the inputs' dtype with the logits made again, d_hidden summed over the ranks."""
    if head.num_live == 0:
        d_hidden, d_weight, d_bias = no_gradients(head, needs)
    else:
        d_hidden, d_weight, d_bias = engine.gradients(head, statistics, upstream, needs, live)
        if needs[0]:
            all_reduce_(d_hidden, head.shard)
    dtype = head.hidden.dtype
    return d_hidden.to(dtype), d_weight.to(dtype), d_bias.to(dtype)
