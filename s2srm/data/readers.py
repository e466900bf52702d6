"""Rows, each with its place, from a JSONL, JSON or Parquet file, a folder of them, or the hub.

Parquet and hub data sets go through `datasets`. JSON text is parsed here, line by line, because
`datasets` reads it column-wise: one value of a wrong type, or one broken line, would make the whole
file unreadable with a message that names neither, and could not be skipped. Left out: CSV and
compressed files.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2srm.errors import UserError

ENDINGS = (".jsonl", ".json", ".parquet")
# A name with one of these is meant as a file, even where the file does not exist.
_FILE_ENDINGS = (*ENDINGS, ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".zip")
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "dev": ("dev", "validation", "valid", "val", "eval"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Row:
    """One row as it was read. error says why it could not be read; data is empty then."""

    source: str
    place: str
    data: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def where(self) -> str:
        """file:12, or file.parquet row 12."""
        return self.source + self.place


def read_rows(path: str, split: str, subset: str | None = None) -> Iterator[Row]:
    """Rows of a file, of one split of a folder, or of a hub data set.

    A missing path or split is a UserError at once, before any row is read. What looks like a path
    is never looked up on the hub. Lines count from 1, rows of Parquet files and hub data sets from
    0, as `dataset[N]` does.
    """
    if not path:
        raise UserError("data path is not set: give a file, a folder or a hub name")
    local = Path(path).expanduser()
    if local.is_dir():
        return _chain(_split_files(local, split))
    if local.exists():
        return _read_file(local)
    if looks_like_path(path):
        raise UserError(f"data path {path!r} does not exist{_nearest_entry(local)}")
    return _read_hub(path, split, subset)


def looks_like_path(name: str) -> bool:
    """True for what can only be meant as a path: hub names are `name` or `owner/name`."""
    return (
        name.startswith((".", "/", "~"))
        or os.sep in name.replace("/", "", 1)
        or "\\" in name
        or name.lower().endswith(_FILE_ENDINGS)
        or name.endswith("/")
        or ("/" in name and Path(name).parent.is_dir())
    )


def _nearest_entry(path: Path) -> str:
    """A hint at a similarly named file, where the parent folder exists."""
    if not path.parent.is_dir():
        return f": there is no folder {str(path.parent)!r} either"
    near = difflib.get_close_matches(path.name, sorted(os.listdir(path.parent)), n=1)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""


def _split_files(folder: Path, split: str) -> list[Path]:
    """The files of one split: by file name, in the folder or in its `data` folder."""
    files: list[Path] = []
    for place in (folder, folder / "data"):
        if place.is_dir() and not files:
            files = sorted(f for f in place.iterdir() if f.is_file() and f.suffix in ENDINGS)
    if not files:
        raise UserError(f"data path {str(folder)!r} holds no file ending in {', '.join(ENDINGS)}")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file), []).append(file)
    wanted = next((s for s, names in _SPLIT_NAMES.items() if split in names), split)
    if wanted in by_split:
        return by_split[wanted]
    if wanted == "train" and set(by_split).isdisjoint(_SPLIT_NAMES):
        return files  # a folder of parts, none of them named after a split
    raise UserError(
        f"data split {split!r}: {str(folder)!r} holds no file of that split; "
        f"found {', '.join(f.name for f in files[:8])}"
    )


def _split_of(file: Path) -> str:
    """train-00000-of-00002.parquet -> train; validation.jsonl -> dev; part.jsonl -> part."""
    stem = file.name.split(".")[0]
    first = stem.replace("_", "-").split("-")[0].lower()
    return next((split for split, names in _SPLIT_NAMES.items() if first in names), stem)


def _chain(files: list[Path]) -> Iterator[Row]:
    for file in files:
        yield from _read_file(file)


def _read_file(file: Path) -> Iterator[Row]:
    if not file.is_file():
        raise UserError(f"data path {str(file)!r} is neither a file nor a folder")
    if file.suffix not in ENDINGS:
        raise UserError(f"data path {str(file)!r} must end in {', '.join(ENDINGS)}")
    if not os.access(file, os.R_OK):
        raise UserError(f"data path {str(file)!r} cannot be read: permission denied")
    if file.suffix == ".parquet":
        return _read_parquet(file)
    if file.suffix == ".json" and _first_character(file) == "[":
        return _read_json_list(file)
    return _read_json_lines(file)


def _first_character(file: Path) -> str:
    """The first character that is neither white space nor a byte order mark."""
    with file.open("rb") as stream:
        start = stream.read(4096)
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1].decode("latin-1")


def _read_json_lines(file: Path) -> Iterator[Row]:
    """One object a line. Lines end at \\n or \\r\\n only; empty lines are passed over."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            yield _parse_line(line.rstrip(b"\r\n"), str(file), f":{number}")


def _parse_line(line: bytes, source: str, place: str) -> Row:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(source, place, error=f"not UTF-8 text (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return Row(source, place, error=f"not valid JSON ({_words(error)} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # numbers of 5000 digits, lists 1000 deep
        return Row(source, place, error=f"not valid JSON ({_one_line(error)})")
    return _object_row(value, source, place)


def _object_row(value: Any, source: str, place: str) -> Row:
    if not isinstance(value, dict):
        return Row(
            source, place, error=f"not a JSON object but {type(value).__name__}: {value!r:.60}"
        )
    return Row(source, place, data=value)


def _read_json_list(file: Path) -> Iterator[Row]:
    """A JSON file that holds one list of objects; where is the line on which an object begins.

    A syntax error ends the file: what follows it cannot be told apart, so it is never skipped.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start + 1})") from None
    decoder = json.JSONDecoder()
    at = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    first = True
    while text[at : at + 1] != "]":
        if not first:
            if text[at : at + 1] != ",":
                raise _broken(file, text, at, "expected ',' or ']'")
            at = _skip_space(text, at + 1)
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _broken(file, text, error.pos, _words(error)) from None
        except (ValueError, RecursionError) as error:
            raise _broken(file, text, at, _one_line(error)) from None
        yield _object_row(value, str(file), f":{line}")
        at, first = _skip_space(text, end), False
    rest = _skip_space(text, at + 1)
    if rest != len(text):
        raise _broken(file, text, rest, "text after the end of the list")


def _broken(file: Path, text: str, at: int, reason: str) -> UserError:
    line = text.count("\n", 0, at) + 1
    return UserError(f"{file}:{line}: not valid JSON ({reason})")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _words(error: json.JSONDecodeError) -> str:
    """The parser's message; some end in "at", with the place to follow."""
    return error.msg.removesuffix(" at")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _read_parquet(file: Path) -> Iterator[Row]:
    """Streamed, so that no second copy of the file is written to a cache."""
    import datasets

    try:
        stream = datasets.load_dataset(
            "parquet", data_files=str(file), split="train", streaming=True
        )
        for number, data in enumerate(stream):
            yield Row(str(file), f" row {number}", data=dict(data))
    # The errors of pyarrow and datasets have no common base; none may reach the user as a
    # traceback, and each keeps its text.
    except Exception as error:
        raise UserError(f"{file}: cannot be read as Parquet ({_one_line(error)})") from error


def _read_hub(name: str, split: str, subset: str | None) -> Iterator[Row]:
    import datasets

    label = f"{name}[{split}]" if subset is None else f"{name}/{subset}[{split}]"
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    # Hub, HTTP and builder errors have no common base; see _read_parquet.
    except Exception as error:
        raise UserError(
            f"data path {name!r} is neither a file or folder here nor a data set that the hub "
            f"gave ({_one_line(error)})"
        ) from error
    for number, data in enumerate(rows):
        yield Row(label, f" row {number}", data=dict(data))
