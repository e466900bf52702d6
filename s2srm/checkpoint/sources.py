"""Sums of what a run reads and a checkpoint does not hold: training rows, and models' weights.

Data order and frozen weights (reference, reward model, an untrained head) follow from them, so a
run that goes on with others would be another run, and nothing else would show it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_ENDS_BYTES = 2**20


def sum_of_rows(rows: Iterable[object]) -> str:
    """Of tokenised rows, in order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(repr(row).encode())
    return total.hexdigest()


def sums_of_models(config: dict[str, Any]) -> dict[str, str]:
    """Dotted key -> sum of the safetensors files of every model folder that the config names.

    Of a file its size and its first and last MiB: enough to tell one training from another, and
    quick for any model. Hub names, whose files do not change, are left out.
    """
    return {
        key: _sum_of_folder(folder)
        for key, folder in _model_folders(config)
        if any(folder.glob("*.safetensors"))
    }


def _model_folders(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Path]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _model_folders(value, f"{prefix}{key}.")
        elif key in ("path", "reference") and isinstance(value, str) and value:
            yield prefix + key, Path(value).expanduser()


def _sum_of_folder(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        total.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            total.update(file.read(_ENDS_BYTES))
            file.seek(max(0, size - _ENDS_BYTES))
            total.update(file.read(_ENDS_BYTES))
    return total.hexdigest()
