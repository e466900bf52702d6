"""Vocabulary-parallel weights: each rank of a group holds a contiguous slice of the vocabulary."""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_MAX_FACTS = 24


class Shard(NamedTuple):
    """This rank's slice: ids [offset, offset + num_local) of num_total; group None is one rank."""

    group: Any
    offset: int
    num_local: int
    num_total: int


def group_name(
    vocab_group: dist.ProcessGroup | None, process_group: dist.ProcessGroup | None = None
) -> str | None:
    """The name under which an operator finds its group; operators take no group objects.

    vocab_group and process_group are two names of one argument.
    """
    if vocab_group is not None and process_group is not None:
        raise ValueError("vocab_group and process_group mean the same: pass one of them")
    for name, group in (("vocab_group", vocab_group), ("process_group", process_group)):
        if group is None:
            continue
        if not torch.compiler.is_compiling() and not hasattr(group, "group_name"):
            raise ValueError(f"{name} must be a ProcessGroup or None, got {group!r}")
        return group.group_name
    return None


def find_shard(
    name: str | None, num_local: int, device: torch.device, facts: Mapping[str, Any]
) -> Shard:
    """Where this rank's slice lies. With a group: one all-gather of a few integers per rank.

    facts: what the ranks must agree on, under the names that their user knows, first the name of
    the operation. Ranks that do not agree would wait for each other for ever, or merge statistics
    of different rows: ValueError on every one of them.
    """
    if name is None:
        return Shard(None, 0, num_local, num_local)
    group = dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage, reportArgumentType]
    checksums = [zlib.crc32(repr(fact).encode()) for fact in facts.values()]
    # Of one length whatever the operation is.
    checksums += [0] * (_MAX_FACTS - len(checksums))
    mine = torch.tensor([num_local, *checksums], device=device)
    table: list[list[int]] = all_gather(mine, group).tolist()
    for i, (fact, value) in enumerate(facts.items(), start=1):
        others = [rank for rank, row in enumerate(table) if row[i] != table[0][i]]
        if others:
            operation = next(iter(facts.values()))
            raise ValueError(
                f"{operation}: the ranks of vocab_group must agree on {fact}, but ranks {others} "
                f"differ from rank 0; this rank, {dist.get_rank(group)}, has {value!r}"
            )
    sizes = [row[0] for row in table]
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
