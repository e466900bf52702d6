"""From what a user passes to what an operator takes: the arguments of every vocabulary operation.

In this order: a sharded weight is gathered, tensors and options are checked, autocast is followed,
a narrower hidden is widened, leading dimensions are flattened, the backend is chosen. Nothing here
reads a tensor's data.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch.distributed as dist
from torch import Tensor

from s2srm_kernels.checks import (
    autocast_inputs,
    check_floating,
    check_head,
    check_main_grad,
    check_rows,
    check_tensors,
    check_whole,
)
from s2srm_kernels.dispatch import choose
from s2srm_kernels.lm_head.gathering import gather_head
from s2srm_kernels.lm_head.gradients_in_forward import wanted_gradients
from s2srm_kernels.lm_head.operation import Inputs
from s2srm_kernels.lm_head.shards import group_name
from s2srm_kernels.options import Number


class HeadKeywords(TypedDict, total=False):
    """What every vocabulary operation with targets may be told, for the types of its overloads."""

    bias: Tensor | None
    softcap: Number | None
    temperature: Number
    ignore_index: int
    num_live: int | None
    vocab_group: dist.ProcessGroup | None
    process_group: dist.ProcessGroup | None
    impl: str


class Call(NamedTuple):
    """One call of a vocabulary operation: the backend, what its operators take, and `hidden`
    (..., D) as it was passed."""

    name: str
    impl: str
    inputs: Inputs
    hidden: Tensor

    def rows(self, name: str, rows: Tensor, *, may_require_grad: bool = True) -> Tensor:
        """A floating value for each row, flattened and detached; ValueError for anything else."""
        check_tensors(self.name, **{name: rows})
        check_rows(name, rows, self.hidden)
        check_floating(name, rows)
        if rows.requires_grad and not may_require_grad:
            raise ValueError(f"{name} requires a gradient but is a constant here: detach it")
        return rows.detach().flatten()

    def optional_rows(
        self, name: str, rows: Tensor | None, *, may_require_grad: bool = True
    ) -> Tensor | None:
        """`rows`, or None."""
        return None if rows is None else self.rows(name, rows, may_require_grad=may_require_grad)

    def shaped(self, result: Tensor) -> Tensor:
        """(N, ...) -> (..., ...): the leading dimensions that hidden had."""
        if self.hidden.dim() == 2:
            return result
        return result.view(*self.hidden.shape[:-1], *result.shape[1:])


def prepare(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: Tensor,
    *,
    ignore_index: int,
    impl: str,
    num_live: int | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    process_group: dist.ProcessGroup | None = None,
    main_grad: Tensor | None = None,
    differentiable: bool = True,
) -> Call:
    """ValueError for what the operation `name` cannot take, naming it."""
    check_tensors(name, hidden=hidden, target=target)
    group = group_name(vocab_group, process_group)
    if main_grad is not None:
        check_main_grad(main_grad, weight)
    weight, bias = gather_head(weight, bias, group)
    check_tensors(name, weight=weight, bias=bias)
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    check_head(hidden, weight, bias, target)
    check_whole("ignore_index", ignore_index)
    _check_num_live(num_live, target)
    if not differentiable:
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    rows = hidden
    if hidden.dim() > 2:
        rows, target = hidden.flatten(0, -2), target.flatten()
    if rows.dtype != weight.dtype:
        rows = rows.to(weight.dtype)
    needs = wanted_gradients(rows, weight, bias)
    inputs = Inputs(
        *(rows, weight, bias, target, options),
        *(ignore_index, num_live, group, needs, main_grad),
    )
    return Call(name, choose(name, impl, rows.device), inputs, hidden)


def _check_num_live(num_live: int | None, target: Tensor) -> None:
    if num_live is None:
        return
    check_whole("num_live", num_live)
    if not 0 <= num_live <= target.numel():
        raise ValueError(
            f"num_live must lie in [0, {target.numel()}], the number of rows, got {num_live}"
        )
