"""Checkpoints as folders: written aside, renamed when complete, verified before they are read.

    RUN/checkpoints/step-00000012/
        state.json                          everything that is not a tensor
        policy-00000-of-00002.safetensors   what rank 0 of 2 holds of the policy and its optimiser
        manifest.json                       size and SHA-256 of all these; written last

The rename is the one moment at which a checkpoint comes to be: whatever a process is killed at, the
folders named step-* are complete, and the newest of them is the latest. Nothing is pickled. Left
out: a `latest` file (the names say it), and folders that the nodes of a run do not share.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2srm.watchdog import pulse

FORMAT = 1
STATE, MANIFEST = "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class FileSum:
    """What a file must be, to the byte."""

    size: int
    sha256: str


def checkpoints_of(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run / "checkpoints"


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps (or phases) is."""
    return checkpoints_of(run) / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name; None for any other name."""
    found = _NAME.fullmatch(checkpoint.name)
    return int(found[1]) if found else None


def list_checkpoints(run: Path) -> list[Path]:
    """A run's complete checkpoints, newest first."""
    folder = checkpoints_of(run)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def list_damaged(run: Path) -> list[Path]:
    """Checkpoints that were set aside because a file of theirs is damaged."""
    return sorted(checkpoints_of(run).glob("damaged-*"))


def temporary_path(run: Path, step: int) -> Path:
    """Where a checkpoint is written until it is complete."""
    final = checkpoint_path(run, step)
    return final.with_name(f".{final.name}.tmp")


def make_temporary(run: Path, step: int) -> Path:
    """An empty folder for a new checkpoint; what a killed process left of earlier ones is gone."""
    checkpoints_of(run).mkdir(parents=True, exist_ok=True)
    drop_temporary(run)
    folder = temporary_path(run, step)
    folder.mkdir()
    return folder


def drop_temporary(run: Path) -> None:
    """Remove what is half-written or half-removed."""
    for leftover in checkpoints_of(run).glob(".*.tmp"):
        shutil.rmtree(leftover)


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> FileSum:
    """Write a file and flush it to the disk."""
    total, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            total.update(chunk)
            size += len(chunk)
            pulse.beat()
        file.flush()
        os.fsync(file.fileno())
    return FileSum(size, total.hexdigest())


def write_json(path: Path, value: Any) -> FileSum:
    """Write a JSON file and flush it to the disk."""
    return write_chunks(path, [(json.dumps(value, indent=1) + "\n").encode()])


def write_manifest(folder: Path, files: Mapping[str, FileSum]) -> None:
    """The list of a checkpoint's files, with a sum of its own."""
    write_chunks(folder / MANIFEST, [_manifest(files)])


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """The files that a checkpoint must have. ValueError or OSError if that cannot be told."""
    data = (folder / MANIFEST).read_bytes()
    entries = json.loads(data)["files"]
    files = {name: FileSum(entry["size"], entry["sha256"]) for name, entry in entries.items()}
    if data != _manifest(files):
        raise ValueError("it is not what was written")
    return files


def commit(temporary: Path, final: Path) -> None:
    """Make a written folder the checkpoint `final`."""
    _sync_folder(temporary)
    if final.exists():
        # From before a resume at an earlier step. A rename does not replace a folder with files.
        replaced = final.with_name(f".{final.name}.old.tmp")
        final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced)
    else:
        temporary.rename(final)
    _sync_folder(final.parent)


def keep_newest(run: Path, number: int) -> None:
    """Remove all but the newest checkpoints."""
    for old in list_checkpoints(run)[number:]:
        remove(old)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; a killed process leaves no half of it under its name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither taken nor counted again."""
    target = checkpoint.with_name(f"damaged-{checkpoint.name}")
    if target.exists():
        shutil.rmtree(target)
    checkpoint.rename(target)
    return target


def find_damage(folder: Path, part: int = 0, num_parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, file first; None if every byte is as it was written.

    Of the files, every num_parts-th is read, beginning with number `part`: the ranks share them.
    """
    try:
        files = read_manifest(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / MANIFEST} cannot be read ({error})"
    for name, wanted in list(files.items())[part::num_parts]:
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != wanted.size:
            return f"{path} has {size} bytes, {wanted.size} were written"
        if _sha256(path) != wanted.sha256:
            return f"{path} is damaged: its SHA-256 is not the one that was written"
    return None


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file: a killed process leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_chunks(temporary, [text.encode()])
    os.replace(temporary, path)
    _sync_folder(path.parent)


def copy_prefix(source: Path, target: Path, size: int) -> None:
    """The first `size` bytes of a file (all of a shorter one) as a new file."""
    left = size
    with source.open("rb") as reader, target.open("wb") as writer:
        while left > 0 and (chunk := reader.read(min(left, _CHUNK_BYTES))):
            writer.write(chunk)
            left -= len(chunk)
            pulse.beat()


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            total.update(chunk)
            pulse.beat()
    return total.hexdigest()


def _manifest(files: Mapping[str, FileSum]) -> bytes:
    listed = {name: {"size": f.size, "sha256": f.sha256} for name, f in sorted(files.items())}
    own = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return (json.dumps({"files": listed, "sha256": own}, indent=1) + "\n").encode()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
