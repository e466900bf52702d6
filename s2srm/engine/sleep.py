"""Tensors that wait in host memory and give their device memory away meanwhile.

What is emptied is the storage under a tensor, so every view of it (tied weights, pieces of flat
buffers, an optimiser's keys) stays the same object and is whole again afterwards. An emptied tensor
must not be read: engines wake before they use one.

Left out: overlap of the copies with computation. They are a few seconds of a phase of minutes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Sleeper:
    """Storages that are emptied and filled again together."""

    def __init__(self) -> None:
        self._copies: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._scratch: list[tuple[torch.UntypedStorage, int]] = []

    @property
    def is_asleep(self) -> bool:
        """Whether there is something to wake."""
        return bool(self._copies or self._scratch)

    def sleep(self, tensors: Iterable[Tensor], scratch: Iterable[Tensor] = ()) -> None:
        """Copy the storages of `tensors` to host memory (pinned beside a GPU) and empty them.

        scratch: tensors whose content nobody needs; they are zero when they wake.
        """
        assert not self.is_asleep, "what sleeps cannot be copied"
        for storage in _storages(scratch):
            self._scratch.append((storage, storage.nbytes()))
            storage.resize_(0)
        for storage in _storages(tensors):
            on_gpu = storage.device.type == "cuda"
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_gpu)
            host.copy_(_bytes(storage), non_blocking=True)
            self._copies.append((storage, host))
        self._wait()
        for storage, _ in self._copies:
            storage.resize_(0)

    def wake(self) -> None:
        """Fill everything again; nothing if nothing sleeps."""
        for storage, host in self._copies:
            storage.resize_(host.numel())
            _bytes(storage).copy_(host, non_blocking=True)
        for storage, size in self._scratch:
            storage.resize_(size)
            _bytes(storage).zero_()
        # The host's memory may be given to others from here on.
        self._wait()
        self._copies, self._scratch = [], []

    def _wait(self) -> None:
        if any(storage.device.type == "cuda" for storage, _ in self._copies):
            torch.cuda.synchronize()


def address(tensor: Tensor) -> int:
    """Where the storage under a tensor begins."""
    return tensor.untyped_storage().data_ptr()


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """The storages under some tensors, each once, empty ones left out."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        # On a CPU a view of a file, or what numpy has seen, cannot be resized; no GPU has such.
        if storage.nbytes() and storage.resizable():
            found.setdefault(address(tensor), storage)
    return list(found.values())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """(n,) uint8 view of a whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
