"""Every kernel and configuration that can be launched, as a compiler wants to hear of it.

For checks on a machine without a GPU: compile each variant ahead of time and look at registers,
shared memory and instructions. A configuration is a row of `_configs`; of the options that a call
may or may not have (bias, softcap, ...) each configuration is listed with none and with all.
"""

# triton annotates its functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false
from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from s2srm_kernels.checks import kept_dtype
from s2srm_kernels.lm_head.engine import SKIP_COLUMNS, SKIP_ROWS
from s2srm_kernels.triton import configs, launch
from s2srm_kernels.triton.backward import (
    logit_gradients_kernel,
    scale_kernel,
    set_targets_kernel,
    stored_gradients_kernel,
)
from s2srm_kernels.triton.configs import Tile
from s2srm_kernels.triton.engine import ONE_PASS_DTYPES
from s2srm_kernels.triton.forward import (
    add_kernel,
    merge_kernel,
    statistics_kernel,
    target_logits_kernel,
)

ARCHITECTURES = (80, 90, 100)
_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
_INPUTS = ("hidden", "weight", "bias", "exponentials", "stored", "gradients", "matrix")
# Written part by part, through a descriptor where the path has them.
_STORES = ("exponentials", "gradients")
_SUMS = (
    *("logits", "target_logits", "fixed_references", "partial", "tile_lse", "references"),
    *("packed", "coefficients", "values", "factor"),
)
_ARRAYS = {
    "columns": "*i32",
    "active": "*i32",
    "holds_target": "*i8",
    "far": "*i8",
    "live_blocks": "*i8",
}
_DOUBLES = ("softcap", "temperature", "lowest", "limit")
# Multiples of 16 wherever the tensors are aligned: what a launch would find out by itself.
_ALIGNED = (
    "depth",
    "split_columns",
    "hidden_stride",
    "weight_stride_v",
    "exponentials_stride",
    "gradients_stride",
    "stored_stride",
    "matrix_stride",
)
# Strides between neighbours.
_ONE = ("weight_stride_d",)


@dataclass(frozen=True)
class Variant:
    """One compilation: triton.compile(ASTSource(kernel, signature, constexprs, attrs), ...).

    name is unique. matrix: it makes products, on the matrix units where the dtype has them. dtype
    is the inputs' ("bf16", ...), arch the compute capability (90).
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    num_stages: int
    matrix: bool
    dtype: str
    arch: int

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler, as at a launch."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": False,
        }


def variants() -> Iterator[Variant]:
    """All of them, architecture by architecture."""
    for arch in ARCHITECTURES:
        for dtype in _NAMES:
            yield from _variants(arch, dtype)


def _variants(arch: int, dtype: torch.dtype) -> Iterator[Variant]:
    family = configs.family_of(divmod(arch, 10))
    paths = [False]
    if dtype.itemsize == 2 and family in configs.DESCRIPTOR_FAMILIES:
        paths.append(True)
    for descriptors, full in itertools.product(paths, (False, True)):
        yield from _logit_kernels(arch, family, dtype, descriptors, full)
    stored = [configs.logits_tile("stored_statistics", family, dtype, path) for path in paths]
    widths = sorted({tile.block_n for tile in stored})
    for width, full in itertools.product(widths, (False, True)):
        constexprs = {
            "LOG_STORE_SCALE": 0.0,
            "BLOCK_R": launch.STORED_ROWS,
            "WIDTH": width,
            "HAS_ENTROPY": full,
            "HAS_CONSTANT": full,
            "CAPPED": full,
        }
        name = f"stored_gradients-{width}-" + ("full" if full else "plain")
        warps = launch.STORED_WARPS
        yield _variant(name, stored_gradients_kernel, arch, dtype, constexprs, warps, 1)
    for full in (False, True):
        fields = dict.fromkeys(("ARGMAX", "COUNT", "ENTROPY", "MEAN"), full)
        yield _variant(
            "merge-" + ("full" if full else "plain"),
            merge_kernel,
            arch,
            dtype,
            {"BLOCK_R": launch.MERGE_ROWS} | fields,
            launch.MERGE_WARPS,
            3,
        )
    if dtype in ONE_PASS_DTYPES:
        fields = {"BLOCK_R": stored[0].block_m, "FAST": True}
        for entropy, first in itertools.product((False, True), (False, True)):
            name = "add" + ("-entropy" if entropy else "") + ("-first" if first else "")
            constexprs = fields | {"ENTROPY": entropy, "FIRST": first}
            yield _variant(name, add_kernel, arch, dtype, constexprs, launch.ADD_WARPS, 3)
        constexprs = {"BLOCK_R": launch.SET_ROWS}
        yield _variant("set_targets", set_targets_kernel, arch, dtype, constexprs, 4, 3)
    if dtype == kept_dtype(dtype):
        constexprs = {"BLOCK": launch.SCALE_BLOCK, "NUM_PROGRAMS": 8 * 132}
        yield _variant("scale", scale_kernel, arch, dtype, constexprs, launch.SCALE_WARPS, 3)


def _logit_kernels(
    arch: int, family: str, dtype: torch.dtype, descriptors: bool, full: bool
) -> Iterator[Variant]:
    """The kernels that make logits; `full` with every option, and sizes that fill no tile."""
    label = ("tma" if descriptors else "pointers") + ("-full" if full else "-plain")
    options = {
        "HAS_BIAS": full,
        "CAPPED": full,
        "SCALED": full,
        # Descriptors need rows of 16 bytes, not of a whole block.
        "EVEN_K": not full,
    }

    def tiled(kernel: str) -> tuple[Tile, dict[str, Any]]:
        wanted = descriptors and configs.has_descriptors(kernel, family)
        tile = configs.logits_tile(kernel, family, dtype, wanted)
        schedule = {
            "TMA": tile.descriptors,
            "FAST": dtype.itemsize == 2,
            "EVEN_N": not full,
            "PARTS": tile.parts,
            "GROUP": tile.group,
            "NUM_PROGRAMS": 132,
        }
        return tile, _blocks(tile) | options | schedule

    tile, constexprs = tiled("statistics")
    warps = (tile.num_warps, tile.num_stages)
    target = {k: v for k, v in constexprs.items() if k in target_logits_kernel.arg_names}
    target["PARTS"] = launch.TARGET_PARTS
    yield _variant(f"target_logits-{label}", target_logits_kernel, arch, dtype, target, *warps)
    fields = ("ARGMAX", "COUNT", "ENTROPY", "MEAN", "TILE_LSE")
    kinds = {
        "statistics": {"ARGMAX", "COUNT", "ENTROPY"},
        "statistics-logprobs": {"ENTROPY"},
        "statistics-lse": set[str](),
    }
    if full:
        kinds = {"statistics": set(fields)}
    plain = {"FIXED": False, "STORE": False, "STORE_SCALE": 1.0}
    for kind, wanted in kinds.items():
        flags = {field: field in wanted for field in fields}
        name = f"{kind}-{label}"
        yield _variant(name, statistics_kernel, arch, dtype, constexprs | plain | flags, *warps)
    if configs.has_descriptors("stored_statistics", family) or not descriptors:
        tile, constexprs = tiled("stored_statistics")
        warps = (tile.num_warps, tile.num_stages)
        kinds = {"stored_statistics": {"ENTROPY", "MEAN"} if full else {"ENTROPY"}}
        if dtype in ONE_PASS_DTYPES:
            kinds |= {"exponentials": {"ENTROPY"} if full else set()}
            if not full:
                kinds |= {"exponentials-entropy": {"ENTROPY"}}
        for kind, wanted in kinds.items():
            flags = {field: field in wanted for field in fields}
            flags |= {"FIXED": kind.startswith("exponentials"), "STORE": True, "STORE_SCALE": 1.0}
            name = f"{kind}-{label}"
            yield _variant(name, statistics_kernel, arch, dtype, constexprs | flags, *warps)
    tile, constexprs = tiled("gradients")
    warps = (tile.num_warps, tile.num_stages)
    terms = {"HAS_ENTROPY": full, "HAS_CONSTANT": full, "HAS_LIVE": full}
    terms |= {"SKIP_ROWS": SKIP_ROWS, "SKIP_COLUMNS": SKIP_COLUMNS}
    name = f"logit_gradients-{label}"
    yield _variant(name, logit_gradients_kernel, arch, dtype, constexprs | terms, *warps)


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}


def _variant(
    name: str,
    kernel: Any,
    arch: int,
    dtype: torch.dtype,
    constexprs: dict[str, Any],
    num_warps: int,
    num_stages: int,
) -> Variant:
    """Fill in the signature from the names of the kernel's arguments."""
    short = _NAMES[dtype]
    sums = "fp64" if dtype == torch.float64 else "fp32"
    constexprs = dict(constexprs)
    constexprs["ACCUMULATOR"] = tl.float64 if dtype == torch.float64 else tl.float32
    constexprs |= {argument: 1 for argument in _ONE if argument in kernel.arg_names}
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constexprs:
            signature[argument] = "constexpr"
            continue
        if argument in ("hidden", "weight") and constexprs.get("TMA"):
            rows = constexprs["BLOCK_M" if argument == "hidden" else "BLOCK_N"]
            signature[argument] = f"tensordesc<{short}[{rows}, {constexprs['BLOCK_K']}]>"
            continue
        if argument in _STORES and constexprs.get("TMA") and constexprs.get("STORE", True):
            width = constexprs["BLOCK_N"] // constexprs["PARTS"]
            signature[argument] = f"tensordesc<{short}[{constexprs['BLOCK_M']}, {width}]>"
            continue
        if argument in _INPUTS:
            signature[argument] = f"*{short}"
        elif argument in _SUMS:
            signature[argument] = f"*{sums}"
        elif argument == "gradient":
            signature[argument] = f"*{short}"
        elif argument in _ARRAYS:
            signature[argument] = _ARRAYS[argument]
        else:
            signature[argument] = "fp64" if argument in _DOUBLES else "i32"
        if signature[argument].startswith("*") or argument in _ALIGNED:
            attrs[(index,)] = [["tt.divisibility", 16]]
    return Variant(
        name=f"{name}-{short}-sm_{arch}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        attrs=attrs,
        num_warps=num_warps,
        num_stages=num_stages,
        matrix="BLOCK_K" in kernel.arg_names,
        dtype=short,
        arch=arch,
    )
