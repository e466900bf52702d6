"""Tile shapes and launch options, chosen by (kernel, architecture, dtype, head, V): never by N.

What is here fixes the order of summation of every logit, so a row has the same bits in any batch.
Nothing is tuned at run time. The shapes follow the sizes of the chips' matrix instructions, shared
memory and registers. `group` and `num_stages` change no bit, `split_columns` the order in which
partial sums are merged: benchmarks/gpu/sweep.py times candidates of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

INTERPRETER = "interpreter"
# Families whose copies go through tensor descriptors (TMA) where strides and addresses allow it.
DESCRIPTOR_FAMILIES = {"sm_90", "sm_100"}
# Triton 3.9 fails on the tensor memory's layouts in these.
_POINTERS_ONLY = {("stored_statistics", "sm_100"), ("stored_sums", "sm_100")}


@dataclass(frozen=True)
class Tile:
    """Shape of a tile of logits and how to launch its kernel.

    parts: pieces in which an epilogue takes a tile, and what one store holds. group: row
    blocks that walk over the same columns at the same time. descriptors: copies of 16-bit blocks go
    through tensor descriptors.
    """

    block_m: int
    block_n: int
    block_k: int
    parts: int
    num_warps: int
    num_stages: int
    group: int = 8
    descriptors: bool = False


def family_of(capability: tuple[int, int]) -> str:
    """Compute capability -> the family whose table serves it; ValueError below 8.0."""
    major, minor = capability
    if major < 8:
        raise ValueError(
            f"impl='triton' needs a GPU of compute capability 8.0 or later, got {major}.{minor}"
        )
    # Consumer chips of later generations (12.x) have the matrix instructions of 8.x.
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def has_descriptors(kernel: str, family: str) -> bool:
    """Whether the kernel takes tensor descriptors there."""
    return family in DESCRIPTOR_FAMILIES and (kernel, family) not in _POINTERS_ONLY


def logits_tile(
    kernel: str, family: str, dtype: torch.dtype, descriptors: bool, plain: bool = True
) -> Tile:
    """The tile of a kernel that makes logits.

    kernel: "statistics", "stored_statistics", "stored_sums" (with entropy or mean), "gradients" or
    "sample". plain: neither bias nor softcap nor temperature; with any of them an epilogue needs
    more registers.
    block_k, which fixes the order of summation, depends on family and dtype alone.
    """
    if family == INTERPRETER:
        return Tile(128, 128, 32, 2, 4, 1, group=2, descriptors=descriptors)
    if dtype == torch.float64:
        return Tile(64, 64, 16, 4, 8, 2)
    if kernel == "sample" and dtype.itemsize == 2:
        # The noise of 16 columns takes the registers that a wider tile's products would.
        if family == "sm_80":
            return Tile(128, 64, 32, 4, 8, 4)
        return Tile(128, 128, 64, 8, 8, 3, descriptors=descriptors)
    if dtype == torch.float32:
        return Tile(64, 64, 16, 1, 8, 2)
    if family == "sm_80":
        if kernel == "statistics":
            return Tile(128, 128, 32, 8, 8, 4) if plain else Tile(128, 64, 32, 4, 8, 4)
        return Tile(128, 128, 32, 2, 8, 4)
    if not descriptors:
        return Tile(128, 128, 64, 8 if kernel == "statistics" else 4, 8, 3)
    if kernel == "stored_sums":
        return Tile(128, 128, 64, 4, 8, 3, descriptors=True)
    if kernel == "statistics" and family == "sm_100" and not plain:
        return Tile(128, 128, 64, 8, 8, 3, descriptors=True)
    parts = 16 if kernel == "statistics" else 4
    return Tile(128, 256, 64, parts, 8, 3, descriptors=True)


def split_columns(num_columns: int) -> int:
    """Columns that one program walks over: a multiple of 256, at most 128 splits up to 2**18."""
    columns = 256
    while columns < 4096 and num_columns > 128 * columns:
        columns *= 2
    return columns
