"""Dense products, torch's own: 16-bit factors with a sum in float32.

Left out: products that skip blocks of zeros (see engine).
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import functools

import torch
from torch import Tensor

# Rows of a float32 sum that are made apart where a product cannot be added to it.
_ADDED_ROWS = 16384


def product_into(left: Tensor, right: Tensor, result: Tensor, accumulate: bool = False) -> None:
    """result = or += left @ right, summed in the compute dtype, rounded once to result's."""
    if left.dtype == result.dtype and (left.is_cuda or left.dtype.itemsize > 2):
        if accumulate:
            torch.addmm(result, left, right, out=result)
        else:
            torch.mm(left, right, out=result)
    elif left.is_cuda:
        # 16-bit factors, float32 result.
        if not accumulate:
            torch.mm(left, right, out_dtype=result.dtype, out=result)
        elif adds_mixed(left.device, left.dtype):
            torch.addmm(result, left, right, out_dtype=result.dtype, out=result)
        else:
            add_by_slabs(left, right, result)
    else:
        # The CPU, and so the interpreter, has neither 16-bit products of one rounding nor mixed.
        product = left.float() @ right.float()
        result.copy_(result + product if accumulate else product)


def add_by_slabs(left: Tensor, right: Tensor, result: Tensor) -> None:
    """result += left @ right with a product of _ADDED_ROWS rows at a time."""
    for start in range(0, result.shape[0], _ADDED_ROWS):
        some = slice(start, start + _ADDED_ROWS)
        if left.dtype == result.dtype:
            result[some] += torch.mm(left[some], right)
        else:
            result[some] += torch.mm(left[some], right, out_dtype=result.dtype)


@functools.cache
def adds_mixed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.addmm adds a product of 16-bit factors to a float32 sum in place.

    Tried, since neither torch's version nor the chip tells; without it a sum is made of products
    of _ADDED_ROWS rows, which costs one more pass over it.
    """
    left, total = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, left, left, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())
