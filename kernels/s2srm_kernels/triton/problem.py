"""One call's logits, ready to launch: inputs, tile, and the arguments that every kernel shares."""

# torch and triton annotate their functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false
from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.triton import configs
from s2srm_kernels.triton.configs import Tile

INTERPRETED = bool(knobs.runtime.interpret)
_ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}
_DESCRIPTOR_ALIGNMENT = 16
# Multiplications and additions are not fused: the target's logit must have the same bits in every
# kernel, whatever stands around it.
OPTIONS: dict[str, Any] = {} if INTERPRETED else {"enable_fp_fusion": False}


class Problem:
    """Live hidden rows (R, D), weight (V, D) and bias of a head, and how to launch on them."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.hidden = head.live_hidden()
        self.weight = head.weight
        self.bias = None if head.bias is None else head.bias.contiguous()
        self.columns = head.columns.to(torch.int32)
        self.family = family_on(self.hidden.device)
        self.programs = programs_on(self.hidden.device)
        self.accumulator = _ACCUMULATORS[head.dtype]
        # The exponential in one instruction: far more exact than 16-bit inputs.
        self.fast = self.hidden.dtype.itemsize == 2
        self.lowest = torch.finfo(head.dtype).min
        self.aligned = all(fits_descriptor(t) for t in (self.hidden, self.weight))

    @property
    def num_rows(self) -> int:
        """R."""
        return self.hidden.shape[0]

    @property
    def num_columns(self) -> int:
        """V of this rank."""
        return self.weight.shape[0]

    def empty(self, *shape: int) -> Tensor:
        """A buffer in the compute dtype."""
        return self.hidden.new_empty(shape, dtype=self.head.dtype)

    def on_device(self) -> AbstractContextManager[Any]:
        """Kernels are launched on the current device."""
        return torch.cuda.device(self.hidden.device) if self.hidden.is_cuda else nullcontext()

    def tile(self, kernel: str, descriptors: bool = True) -> Tile:
        """The kernel's tile; descriptors: where they fit."""
        descriptors &= self.aligned and configs.has_descriptors(kernel, self.family)
        head = self.head
        plain = head.bias is None and head.softcap is None and head.temperature == 1.0
        return configs.logits_tile(kernel, self.family, self.hidden.dtype, descriptors, plain)

    def operands(
        self, tile: Tile, rows: slice, columns: slice, pointers: bool = False
    ) -> dict[str, Any]:
        """hidden, weight and bias of some rows and columns, with their strides and options."""
        head, hidden, weight = self.head, self.hidden[rows], self.weight[columns]
        bias = hidden if self.bias is None else self.bias[columns]
        descriptors = tile.descriptors and not pointers
        shared = {
            "bias": bias,
            "num_rows": hidden.shape[0],
            "depth": hidden.shape[1],
            "hidden_stride": hidden.stride(0),
            "weight_stride_v": weight.stride(0),
            "weight_stride_d": weight.stride(1),
            "softcap": 1.0 if head.softcap is None else head.softcap,
            "temperature": head.temperature,
            "ACCUMULATOR": self.accumulator,
            "HAS_BIAS": self.bias is not None,
            "CAPPED": head.softcap is not None,
            "SCALED": head.temperature != 1.0,
            "FAST": self.fast,
            "EVEN_K": hidden.shape[1] % tile.block_k == 0,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            **OPTIONS,
        }
        if not descriptors:
            return {"hidden": hidden, "weight": weight, **shared}
        return {
            "hidden": descriptor(hidden, tile.block_m, tile.block_k),
            "weight": descriptor(weight, tile.block_n, tile.block_k),
            **shared,
        }

    def target(self, matrix: Tensor, tile: Tile) -> Tensor | TensorDescriptor:
        """What a kernel stores parts of its tiles through."""
        if not tile.descriptors:
            return matrix
        return descriptor(matrix, tile.block_m, tile.block_n // tile.parts)

    def schedule(self, tile: Tile, num_columns: int) -> dict[str, Any]:
        """Constants of a kernel with a persistent grid."""
        return {
            "TMA": tile.descriptors,
            "EVEN_N": num_columns % tile.block_n == 0,
            "PARTS": tile.parts,
            "GROUP": tile.group,
            "NUM_PROGRAMS": self.programs,
        }


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A host-side descriptor for blocks of (rows, columns)."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def fits_descriptor(matrix: Tensor) -> bool:
    """16-byte strides and address, rows contiguous, a 16-bit dtype."""
    itemsize = matrix.dtype.itemsize
    return (
        itemsize == 2
        and matrix.stride(1) == 1
        and matrix.stride(0) * itemsize % _DESCRIPTOR_ALIGNMENT == 0
        and matrix.data_ptr() % _DESCRIPTOR_ALIGNMENT == 0
    )


@functools.cache
def family_on(device: torch.device) -> str:
    """The architecture family of a device; ValueError if the kernels do not run there."""
    if INTERPRETED and device.type == "cpu":
        return configs.INTERPRETER
    return configs.family_of(torch.cuda.get_device_capability(device))


@functools.cache
def programs_on(device: torch.device) -> int:
    """Programs of a persistent grid: one for each multiprocessor."""
    if device.type == "cpu":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel."""
    kernel[grid](*arguments, **options)
