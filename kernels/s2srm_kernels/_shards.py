"""Vocabulary-parallel weights: each rank of a group holds a contiguous slice of the vocabulary."""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Shard(NamedTuple):
    """This rank's slice: ids [offset, offset + num_local) of num_total; group None is one rank."""

    group: Any
    offset: int
    num_local: int
    num_total: int


def group_name(process_group: dist.ProcessGroup | None) -> str | None:
    """The name under which an operator finds its process group; operators take no group objects."""
    return None if process_group is None else process_group.group_name


def find_shard(name: str | None, num_local: int, device: torch.device) -> Shard:
    """Where this rank's slice lies. With a group: one all-gather of one integer per rank."""
    if name is None:
        return Shard(None, 0, num_local, num_local)
    group = dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage, reportArgumentType]
    sizes: list[int] = (
        all_gather(torch.tensor([num_local], device=device), group).flatten().tolist()
    )
    return Shard(group, sum(sizes[: dist.get_rank(group)]), num_local, sum(sizes))


def all_gather(values: Tensor, group: Any) -> Tensor:
    """(...) on every rank -> (world, ...) in rank order."""
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, values.contiguous(), group=group)
    return torch.stack(gathered)


def all_reduce_(values: Tensor, shard: Shard) -> Tensor:
    """Sum over the group, in place; the identity with one rank."""
    if shard.group is not None:
        dist.all_reduce(values, group=shard.group)
    return values


def all_reduce_max_(values: Tensor, shard: Shard) -> Tensor:
    """Maximum over the group, in place; the identity with one rank."""
    if shard.group is not None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=shard.group)
    return values
