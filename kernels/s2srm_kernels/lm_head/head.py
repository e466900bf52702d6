"""The LM head of one call: what every engine computes on.

    z = (hidden @ weight.T + bias);  z = softcap * tanh(z / softcap);  z = z / temperature

in at least float32, over the rows whose target is not ignore_index: the others are dropped before
anything is read.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from s2srm_kernels.checks import assert_on_device, compute_dtype
from s2srm_kernels.lm_head.shards import Shard, find_shard


def live_rows(
    target: Tensor, ignore_index: int, num_classes: int, num_live: int | None = None
) -> Tensor:
    """(R,) int64: the rows whose target is not ignore_index, ascending.

    ValueError for a live target outside [0, num_classes), naming the first such row. On CUDA this
    is the one synchronisation of an operator: the counts come over in a single transfer. With
    num_live there is none, so that a CUDA graph can hold the call: the same is then asserted on the
    device, as the targets of F.cross_entropy are.
    """
    if target.numel() == 0 and not num_live:
        return torch.empty(0, dtype=torch.int64, device=target.device)
    live = target != ignore_index
    bad = live & ((target < 0) | (target >= num_classes))
    if num_live is not None:
        assert_on_device(
            live.sum() == num_live, f"num_live is {num_live}, not the number of live targets"
        )
        named = f"a target is neither in [0, {num_classes}) nor ignore_index {ignore_index}"
        assert_on_device(~bad.any(), named)
        if num_live == target.shape[0]:
            return torch.arange(num_live, device=target.device)
        return torch.nonzero_static(live, size=num_live, fill_value=0).squeeze(1)
    counts: list[int] = torch.stack([live.sum(), bad.sum(), bad.byte().argmax()]).tolist()
    num_live, num_bad, row = counts
    if num_bad:
        raise ValueError(
            f"target[{row}] is {int(target[row])}: neither in [0, {num_classes}) nor "
            f"ignore_index {ignore_index}"
        )
    return torch.nonzero_static(live, size=num_live).squeeze(1)


def digest(values: Tensor) -> int:
    """A number that tells integers and their order apart; a synchronisation on CUDA."""
    place = torch.arange(1, values.numel() + 1, device=values.device)
    return int(((values.long() + place) * (2 * place + 1)).sum())


class Head:
    """One call's live rows, weight and options. R live rows, V columns on this rank.

    hidden (N, D), weight (V, D), bias (V,) or None: as passed, in the inputs' dtype and strides.
    rows (R,) int64: the live rows, ascending. target (R,) int64: their ids in the whole vocabulary.
    columns (R,) int64: the target's column on this rank, -1 where another rank owns it.
    dtype: of statistics and sums, float32 (float64 for float64 inputs).

    A softcap of infinity is none. num_live: R, where the caller knows it (see live_rows); `waits`
    is False then, and checks of data must not synchronise. facts: what else the ranks of a group
    must agree on (see find_shard), first `operation`.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        softcap: float | None,
        temperature: float,
        ignore_index: int,
        group: str | None,
        *,
        num_live: int | None = None,
        **facts: Any,
    ) -> None:
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.softcap = None if softcap == math.inf else softcap
        self.temperature = temperature
        self.dtype = compute_dtype(hidden)
        if group is not None:
            facts |= {
                "hidden's shape": tuple(hidden.shape),
                "dtype": hidden.dtype,
                "whether there is a bias": bias is not None,
                "temperature": temperature,
                "softcap": self.softcap,
                "ignore_index": ignore_index,
                "num_live": num_live,
                "target": digest(target),
            }
        self.shard: Shard = find_shard(group, weight.shape[0], weight.device, facts)
        self.waits = num_live is None
        self.rows = live_rows(target, ignore_index, self.shard.num_total, num_live)
        self.target = target[self.rows].long()
        self.columns = self.columns_of(self.target)

    def columns_of(self, ids: Tensor) -> Tensor:
        """Ids of the whole vocabulary -> columns on this rank, -1 where another rank owns it."""
        local = ids - self.shard.offset
        owned = (local >= 0) & (local < self.shard.num_local)
        return local.where(owned, -1)

    def retarget(self, target: Tensor) -> Head:
        """The same head and rows with other targets (R,) int64."""
        head = copy.copy(self)
        head.target, head.columns = target, self.columns_of(target)
        return head

    @property
    def num_live(self) -> int:
        """R."""
        return self.rows.shape[0]

    def live_hidden(self) -> Tensor:
        """(R, D) contiguous, in the inputs' dtype; hidden itself where every row is live."""
        if self.num_live == self.hidden.shape[0]:
            return self.hidden.contiguous()
        return self.hidden.index_select(0, self.rows)

    def live(self, values: Tensor | None) -> Tensor | None:
        """(N,) -> (R,) values of the live rows; the others are never read."""
        return None if values is None else values[self.rows].to(self.dtype)

    def scatter(self, values: Tensor) -> Tensor:
        """(R, ...) -> (N, ...), zeros in ignored rows."""
        full = values.new_zeros((self.hidden.shape[0], *values.shape[1:]))
        return full.index_copy_(0, self.rows, values)
