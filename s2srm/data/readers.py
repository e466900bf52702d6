"""Rows, each with its place, from a data path: a file, a folder of files, or a hub data set.

    json_lines   .jsonl and .json, also compressed
    tables       .parquet, .arrow, folders written by save_to_disk, the hub
    splits       which files of a folder are read

Left out: CSV, archives of several files, patterns and URLs; each is refused with what to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from s2srm.data.json_lines import read_json
from s2srm.data.schema import Row
from s2srm.data.splits import (
    ENDINGS_SHOWN,
    ending_of,
    is_saved_dataset,
    split_files,
)
from s2srm.data.tables import read_arrow, read_hub, read_parquet, read_saved
from s2srm.errors import UserError
from s2srm.paths import looks_like_path, nearest_entry

_TO_JSON = (
    "write it as .jsonl first: datasets.load_dataset('csv', data_files=...)['train'].to_json(...)"
)
_REMEDIES = {
    ".csv": _TO_JSON,
    ".tsv": _TO_JSON,
    ".txt": "write one JSON object a line into a .jsonl file",
    ".ndjson": "name it .jsonl",
    ".zip": "unpack it",
    ".tar": "unpack it",
}


def read_rows(path: str, split: str, subset: str | None = None) -> Iterator[Row]:
    """Rows of a file, of one split of a folder, or of a hub data set.

    A missing path or split is a UserError at once, before any row is read. What looks like a path
    is never looked up on the hub. A file that is named itself is read whatever the split is. Lines
    count from 1, rows of tables from 0, as `dataset[N]` does.
    """
    if not path:
        raise UserError("data path is not set: give a file, a folder or a hub name")
    if "://" in path:
        raise UserError(f"data path {path!r} is a URL: download it and give the file")
    try:
        local = Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"data path {path!r}: {error}") from None
    if local.is_dir():
        return _read_folder(local, split)
    if local.exists() or local.is_symlink():
        return _read_file(local)
    if looks_like_path(path):
        raise UserError(f"data path {path!r} does not exist{nearest_entry(local)}")
    return read_hub(path, split, subset, nearest_entry(local) if local.parent.is_dir() else "")


def _read_folder(folder: Path, split: str) -> Iterator[Row]:
    if is_saved_dataset(folder):
        if split != "train":
            raise UserError(
                f"data split {split!r}: {str(folder)!r} is one data set written by save_to_disk, "
                "without splits; read it as split train"
            )
        return read_saved(folder)
    return _chain(split_files(folder, split))


def _chain(files: list[Path]) -> Iterator[Row]:
    for file in files:
        yield from read_saved(file) if file.is_dir() else _read_file(file)


def _read_file(file: Path) -> Iterator[Row]:
    if not file.exists():
        target = os.readlink(file)
        raise UserError(f"data path {str(file)!r} is a link to {target!r}, which is gone")
    if not file.is_file():
        raise UserError(f"data path {str(file)!r} is neither a file nor a folder")
    ending, _ = ending_of(file)
    if not ending:
        remedy = next((r for e, r in _REMEDIES.items() if e in file.suffixes), "")
        raise UserError(
            f"data path {str(file)!r} must end in {ENDINGS_SHOWN}{f'; {remedy}' if remedy else ''}"
        )
    if not os.access(file, os.R_OK):
        raise UserError(f"data path {str(file)!r} cannot be read: permission denied")
    if ending == ".parquet":
        return read_parquet(file)
    if ending == ".arrow":
        return read_arrow(file)
    return read_json(file)
