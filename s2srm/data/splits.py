"""Which files of a folder belong to a split, by their names and those of their sub-folders.

    hh_train.jsonl   prefs-validation.jsonl   train/part1.jsonl   data/test-00000-of-00002.parquet

A name is taken apart into words; one of the words below puts the file into a split. What counts is
that held-out rows never come into training: a name with the words of two splits is refused, and
a file without such a word is not read beside files that have one. A split that is none of these
words (`train_prefs`) is the file of that name.

Left out: sub-folders that are called neither `data` nor after a split.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s2srm.errors import UserError
from s2srm.paths import COMPRESSIONS, DATA_ENDINGS

logger = logging.getLogger(__name__)

ENDINGS_SHOWN = ".jsonl, .json (also with .gz, .bz2, .xz or .zst), .parquet, .arrow"

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "dev": ("dev", "validation", "valid", "val", "eval", "evaluation"),
    "test": ("test", "testing"),
    "heldout": ("heldout", "holdout", "unseen"),
    "ood": ("ood",),
}
# trainset, test2 and dev_data are train, test and dev; trainer, latest and contest are nothing.
_SPLIT_OF_WORD = {
    re.compile(rf"({'|'.join(words)})(?:set|split|data)?\d*"): split
    for split, words in _SPLIT_WORDS.items()
}
_HELD_OUT = re.compile(r"(held|hold)[^a-z0-9]?out")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
# What counts the parts of one split and does not name another one.
_PART = re.compile(r"\d+|of|parts?\d*|shards?\d*|set|split|data|[a-z]")
# Files that datasets, the hub and model folders put beside the data.
_METADATA = re.compile(
    r"(dataset_(info|infos|dict)|state|metadata|\w*config|\w*tokenizer\w*|\w*_map|package)\.json"
)


@dataclass(frozen=True)
class _Entry:
    """A data file, or a folder that save_to_disk wrote."""

    path: Path
    shown: str
    splits: frozenset[str]
    own_name: str


def ending_of(path: Path) -> tuple[str, str | None]:
    """x.jsonl.gz -> (.jsonl, gzip); the ending is empty where it is not one that is read."""
    name = path.name.lower()
    compression = next((c for end, c in COMPRESSIONS.items() if name.endswith(end)), None)
    stem, ending = os.path.splitext(name)
    if compression is not None:
        ending = os.path.splitext(stem)[1]
        return (ending if ending in (".jsonl", ".json") else ""), compression
    return (ending if ending in DATA_ENDINGS else ""), None


def is_saved_dataset(folder: Path) -> bool:
    """True for what Dataset.save_to_disk writes; a DatasetDict is a folder of such folders."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of one split, sorted. UserError where there are none or the names leave it open."""
    entries = _entries(folder)
    wanted = _choose(folder, split, entries)
    _check_once(folder, split, wanted)
    chosen = {e.path for e in wanted}
    rest = [e.shown for e in entries if e.path not in chosen] + _others(folder, entries)
    logger.info(
        "%s: split %r reads %s%s",
        folder,
        split,
        _listed([e.shown for e in wanted]),
        f"; not read: {_listed(rest)}" if rest else "",
    )
    return [e.path for e in wanted]


def _entries(folder: Path) -> list[_Entry]:
    """What there is to read, in the folder or, where it has nothing, in its `data` folder."""
    for place in (folder, folder / "data"):
        found = _entries_of(folder, place) if place.is_dir() else []
        if found:
            return found
    others = _others(folder, [])
    raise UserError(
        f"data path {str(folder)!r} holds no file ending in {ENDINGS_SHOWN}, nor a sub-folder "
        f"called data or after a split that does{f'; found {_listed(others)}' if others else ''}"
    )


def _others(folder: Path, entries: Sequence[_Entry]) -> list[str]:
    """What else lies in the folder."""
    used = {Path(e.shown).parts[0] for e in entries}
    return [p.name + "/" * p.is_dir() for p in _listing(folder) if p.name not in used]


def _entries_of(folder: Path, place: Path) -> list[_Entry]:
    found: list[_Entry] = []
    for path in _listing(place):
        if not path.is_dir():
            if ending_of(path)[0] and not _METADATA.fullmatch(path.name.lower()):
                found.append(_entry(folder, path))
        elif is_saved_dataset(path):
            found.append(_entry(folder, path))
        elif _splits_of(_words_of(path)):
            found.extend(_entries_of(folder, path))
    return found


def _listing(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"data path {str(folder)!r} cannot be listed: {error.strerror}") from None
    return [folder / name for name in names if not name.startswith((".", "_", "~"))]


def _entry(folder: Path, path: Path) -> _Entry:
    """The names below the folder decide, the nearest to the file first."""
    below = path.relative_to(folder)
    words = [_words_of(Path(part)) for part in reversed(below.parts)]
    splits = frozenset(split for part in words for split in _splits_of(part))
    named = next((part for part in words if _splits_of(part)), words[0])
    return _Entry(path, below.as_posix(), splits, _own_name(named))


def _own_name(words: Sequence[str]) -> str:
    """ultra_train_prefs_2 -> train_prefs: from the split's word on, without numbers of parts."""
    for start, word in enumerate(words):
        found = next((m for p in _SPLIT_OF_WORD if (m := p.fullmatch(word))), None)
        if found is not None:
            rest = [w for w in words[start + 1 :] if not _PART.fullmatch(w)]
            return "_".join([found.group(1), *rest])
    return "_".join(words)


def _stem(path: Path) -> str:
    name = path.name
    for end in (*COMPRESSIONS, *DATA_ENDINGS):
        if name.lower().endswith(end):
            name = name[: -len(end)]
    return _SHARD.sub("", name)


def _words_of(path: Path) -> list[str]:
    """hhTrain-00000-of-00002.parquet -> hh, train; held_out -> heldout."""
    stem = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", _stem(path)).lower()
    stem = _HELD_OUT.sub(r"\1out", stem)
    return [word for word in re.split(r"[^a-z0-9]+", stem) if word]


def _splits_of(words: Sequence[str]) -> frozenset[str]:
    """The splits that words stand for."""
    return frozenset(
        split
        for word in words
        for pattern, split in _SPLIT_OF_WORD.items()
        if pattern.fullmatch(word)
    )


def _choose(folder: Path, split: str, entries: list[_Entry]) -> list[_Entry]:
    word = _HELD_OUT.sub(r"\1out", split.lower())
    group = next((s for s, words in _SPLIT_WORDS.items() if word in words), None)
    if group is None:
        wanted = [e for e in entries if split.lower() in _names(e)]
    else:
        _check_one_split_each(folder, entries)
        wanted = [e for e in entries if group in e.splits]
        if group == "train" and not any(e.splits for e in entries):
            return entries  # a folder of parts, none of them named after a split
    if not wanted:
        raise UserError(
            f"data split {split!r}: {str(folder)!r} holds no file of that split; "
            f"found {_listed([e.shown for e in entries])}; set data.split to the name of one, "
            "or give one file as data.path"
        )
    names = sorted({e.own_name for e in wanted})
    if group is None or len(names) == 1:
        return wanted
    if word in names:
        return [e for e in wanted if e.own_name == word]
    raise UserError(
        f"data split {split!r} of {str(folder)!r} could be {' or '.join(names)}; set data.split "
        f"to one of {_listed(sorted({_stem(e.path) for e in wanted}))}, or give one file as "
        "data.path"
    )


def _check_one_split_each(folder: Path, entries: list[_Entry]) -> None:
    for entry in entries:
        if len(entry.splits) > 1:
            raise UserError(
                f"data path {str(folder)!r}: {entry.shown} is named after two splits "
                f"({' and '.join(sorted(entry.splits))}); rename it, or give one file as data.path"
            )


def _names(entry: _Entry) -> set[str]:
    """What a split may be called that is meant by its own name."""
    parts = Path(entry.shown).parts
    return {_stem(entry.path).lower(), entry.path.name.lower(), *(p.lower() for p in parts[:-1])}


def _check_once(folder: Path, split: str, entries: list[_Entry]) -> None:
    """UserError where the same rows would be read twice: x.jsonl beside x.parquet or x.jsonl.gz."""
    kinds: dict[str, str] = {}
    stems: dict[str, str] = {}
    for entry in entries:
        kinds.setdefault(ending_of(entry.path)[0], entry.shown)
        name = entry.path.name.lower()
        stem = name[: -len(entry.path.suffix)] if ending_of(entry.path)[1] else name
        other = stems.setdefault(str(entry.path.parent / stem), entry.shown)
        if other != entry.shown:
            raise _twice(folder, split, other, entry.shown)
    if len(kinds) > 1:
        raise _twice(folder, split, *list(kinds.values())[:2])


def _twice(folder: Path, split: str, one: str, other: str) -> UserError:
    return UserError(
        f"data path {str(folder)!r}: split {split!r} would read {one} and {other}, which may hold "
        "the same rows; give one of them as data.path, or leave one kind of file in the folder"
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
