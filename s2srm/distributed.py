"""The few collectives that the trainer itself needs; with one process they are the identity."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s2srm.watchdog import pulse

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64)


def start(timeout_minutes: int = 30) -> None:
    """Join torchrun's process group (NCCL where there is CUDA, else gloo); leave it at exit.

    Does nothing in a single process and when a group is there already.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    atexit.register(_stop)


def start_alone() -> None:
    """A process group of one, without torchrun's variables: DeepSpeed wants one to be there."""
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    atexit.register(_stop)


def _stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank: from the process group, else from torchrun's variables, else 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks."""
    return (
        dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    )


def is_main() -> bool:
    """True on rank 0, which prints and writes."""
    return rank() == 0


def device() -> torch.device:
    """The device of this rank: cuda:LOCAL_RANK where there is CUDA, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum over all ranks; every rank gets the result. The input is left as it is."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values.clone()
    total = values.detach().clone()
    pulse.collective()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def max_over_ranks(value: int) -> int:
    """Largest of the ranks' values."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    pulse.collective()
    largest = torch.tensor([value], dtype=torch.int64, device=device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def gather_objects(value: Any) -> list[Any]:
    """One small picklable object per rank, in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    pulse.collective()
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_tensors(local: Tensor) -> list[Tensor]:
    """Every rank's tensor of one dimension, in rank order, on every rank; a rank may have none.

    Their lengths may differ, their dtype may not: an empty one has the dtype of the others.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [local]
    header = torch.tensor([local.numel(), _DTYPES.index(local.dtype)], device=local.device)
    pulse.collective()
    headers = [torch.empty_like(header) for _ in range(dist.get_world_size())]
    dist.all_gather(headers, header)
    sizes, kinds = zip(*(found.tolist() for found in headers), strict=True)
    assert len(set(kinds)) == 1, f"ranks gather {[_DTYPES[kind] for kind in kinds]} at once"
    # NCCL and gloo gather equal lengths only.
    padded = local.new_zeros(max(sizes))
    padded[: local.numel()] = local.detach()
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded)
    return [tensor[:size] for tensor, size in zip(found, sizes, strict=True)]


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        pulse.collective()
        dist.barrier()
