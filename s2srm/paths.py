"""Whether a setting's text is meant as a path or as the name of something on the hub, which is
`name` or `owner/name`."""

from __future__ import annotations

import os
from pathlib import Path

from s2srm.errors import did_you_mean

COMPRESSIONS = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
}
DATA_ENDINGS = (".jsonl", ".json", ".parquet", ".arrow")
"""Of the data files that are read, beside their compressed forms."""
TO_CONVERT = (".csv", ".tsv", ".txt", ".ndjson", ".zip", ".tar")
"""Of files that hold data which has to be written otherwise first."""


def exists(path: str | Path) -> bool:
    """Path.exists, and False for a text that no file system would take as a name."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def is_folder(path: str | Path) -> bool:
    """Path.is_dir, likewise."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def looks_like_path(name: str) -> bool:
    """True for what can only be meant as a path, whether or not it is there."""
    return (
        name.startswith((".", "/", "~"))
        or os.sep in name.replace("/", "", 1)
        or "\\" in name
        or is_pattern(name)
        or name.lower().endswith((*DATA_ENDINGS, *COMPRESSIONS, *TO_CONVERT))
        or name.endswith("/")
        or ("/" in name and is_folder(Path(name).parent))
    )


def is_pattern(name: str) -> bool:
    """Whether a name stands for several files."""
    return any(c in name for c in "*?[,")


def nearest_entry(path: Path) -> str:
    """What to do about a path that is not there: a similar name beside it, or what is missing."""
    if is_pattern(path.name):
        return ": give one file, or one folder of files; patterns and lists are not read"
    if not is_folder(path.parent):
        return f": there is no folder {str(path.parent)!r} either"
    beside = {name: str(path.parent / name) for name in sorted(os.listdir(path.parent))}
    return did_you_mean(path.name, beside, shown=beside)
