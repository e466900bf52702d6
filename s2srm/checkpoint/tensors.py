"""Flat tensors in safetensors files, written one at a time and read by ranges.

safetensors' own writer wants all tensors of a file in memory, twice; a rank's optimiser state is
what fills its memory already.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from s2srm.checkpoint.files import FileSum, write_chunks
from s2srm.watchdog import pulse

_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16"}


class Entry(NamedTuple):
    """Elements start, start + 1, ... of a parameter flattened, or of a moment of its optimiser.

    kind  "weight", "step", or the optimiser's name of a moment
    """

    kind: str
    start: int
    name: str


def write_tensors(path: Path, tensors: Sequence[tuple[Entry, Tensor]]) -> FileSum:
    """Write contiguous flat tensors of any device."""
    header: dict[str, Any] = {}
    offset = 0
    for entry, tensor in tensors:
        end = offset + tensor.numel() * tensor.element_size()
        header["/".join(map(str, entry))] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    return write_chunks(path, _chunks(header, tensors))


def _chunks(
    header: dict[str, Any], tensors: Sequence[tuple[Entry, Tensor]]
) -> Iterator[bytes | memoryview]:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for _, tensor in tensors:
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


class TensorFiles:
    """What all ranks wrote of one model, read by ranges."""

    def __init__(self, paths: Sequence[Path]) -> None:
        # (parameter, kind) -> [(first element, end, key, file)]
        self._entries: dict[tuple[str, str], list[tuple[int, int, str, Any]]] = {}
        for path in paths:
            file: Any = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                kind, start, name = key.split("/", 2)
                end = int(start) + file.get_slice(key).get_shape()[0]
                self._entries.setdefault((name, kind), []).append((int(start), end, key, file))

    @property
    def names(self) -> set[str]:
        """The parameters."""
        return {name for name, _ in self._entries}

    def kinds(self, name: str) -> list[str]:
        """What there is of a parameter."""
        return [kind for n, kind in self._entries if n == name]

    def scalar(self, name: str, kind: str) -> float:
        """A value that there is one of for every piece: the first piece's."""
        _, _, key, file = self._entries[name, kind][0]
        return float(file.get_tensor(key))

    def read(self, name: str, kind: str, start: int, target: Tensor) -> None:
        """Fill the flat `target` with elements start, start + 1, ..."""
        end = start + target.numel()
        num_read = 0
        for first, last, key, file in self._entries.get((name, kind), []):
            low, high = max(start, first), min(end, last)
            if low < high:
                part = file.get_slice(key)[low - first : high - first]
                target[low - start : high - start].copy_(part)
                num_read += high - low
        pulse.beat()
        assert num_read == target.numel(), f"{kind} of {name}: {num_read} of {target.numel()} found"
