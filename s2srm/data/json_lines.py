"""Rows of JSON files: one object a line, or one list of objects; plain or compressed.

JSON text is parsed here, line by line, because `datasets` reads it column-wise: one value of a
wrong type, or one broken line, would make the whole file unreadable with a message that names
neither, and could not be skipped. Left out: objects that span several lines.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from s2srm.data.schema import Row
from s2srm.data.splits import ending_of
from s2srm.errors import UserError

_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
# How files begin that are something else than their name says.
_OTHER_KINDS = {
    b"\x1f\x8b": "is compressed by gzip; name it with .gz at its end",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; name it with .zst at its end",
    b"\xfd7zXZ": "is compressed by xz; name it with .xz at its end",
    b"BZh": "is compressed by bzip2; name it with .bz2 at its end",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"PAR1": "is a Parquet file; name it .parquet",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
    b"{\x00": "is UTF-16 text; save it as UTF-8",
    b"[\x00": "is UTF-16 text; save it as UTF-8",
    b"version https://git-lfs": "is a pointer of Git LFS and not the data; run `git lfs pull`",
    b"<": "is HTML or XML and not JSON; was a web page saved in the place of the file?",
}


def read_json(file: Path) -> Iterator[Row]:
    """Rows with the line on which each begins. UserError for a file that cannot be read on."""
    start = first_bytes(file)
    other = next((words for magic, words in _OTHER_KINDS.items() if start.startswith(magic)), None)
    if other is not None:
        raise UserError(f"{file} {other}")
    start = start.removeprefix(_BOM).lstrip()
    ending = ending_of(file)[0]
    if start[:1] == b"[":
        if ending == ".json":
            return _read_list(file)
        if _is_broken(start):
            raise UserError(f"{file} holds one JSON list and not one object a line; name it .json")
    if start.partition(b"\n")[0].strip() == b"{" or (
        ending == ".json" and start[:1] == b"{" and _is_broken(start)
    ):
        _refuse_long_objects(file)
    return _read_lines(file)


def first_bytes(file: Path) -> bytes:
    """The beginning of what a file holds, unpacked."""
    with _open(file) as stream:
        try:
            return stream.read(1 << 16)
        except _READ_ERRORS as error:
            raise _unreadable(file, error) from None


def one_line(error: BaseException) -> str:
    """An exception's message on one line, cut where it is long."""
    return " ".join(str(error).split())[:200] or type(error).__name__


_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


def _open(file: Path) -> IO[bytes] | io.BufferedIOBase:
    compression = ending_of(file)[1]
    try:
        if compression == "gzip":
            return gzip.open(file)
        if compression == "bz2":
            return bz2.open(file)
        if compression == "xz":
            return lzma.open(file)
        if compression == "zstd":
            return _open_zstd(file)
        return file.open("rb")
    except OSError as error:
        raise _unreadable(file, error) from None


def _open_zstd(file: Path) -> io.BufferedReader:
    """Through pyarrow, which datasets brings along: Python's own zstd begins at 3.14."""
    import pyarrow

    stream: Any = pyarrow.input_stream(str(file), compression="zstd")
    return io.BufferedReader(stream)


def _unreadable(file: Path, error: BaseException, line: int = 0) -> UserError:
    compression = ending_of(file)[1]
    how = f"unpacked by {compression}" if compression else "read"
    after = f" after line {line}" if line else ""
    return UserError(f"{file} cannot be {how}{after}: {one_line(error)}")


def _is_broken(start: bytes) -> bool:
    """Whether the first line is not a whole JSON value. A line beyond what was read is whole."""
    line, newline, _ = start.partition(b"\n")
    if not newline and len(start) > 1 << 15:
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _refuse_long_objects(file: Path) -> None:
    """UserError for objects that span lines: rows, or one as in {"data": [...]}."""
    with _open(file) as stream:
        try:
            text = stream.read().decode("utf-8-sig").lstrip()
            value, end = json.JSONDecoder().raw_decode(text)
        except (*_READ_ERRORS, ValueError, RecursionError):
            return  # read line by line, which names the line that is wrong
    if "\n" not in text[:end]:
        return
    if text[end:].strip():
        raise UserError(f"{file} holds objects that span several lines; write one object a line")
    keys = ", ".join(map(repr, list(value)[:8]))
    raise UserError(
        f"{file} holds one JSON object with the keys {keys} and not rows; write a list of "
        "objects, or one object a line"
    )


def _read_lines(file: Path) -> Iterator[Row]:
    """One object a line. Lines end at \\n or \\r\\n only; empty lines are passed over."""
    number = 0
    with _open(file) as stream:
        try:
            for number, line in enumerate(stream, start=1):
                text = line.removeprefix(_BOM) if number == 1 else line
                if text.strip():
                    yield _parse_line(text.rstrip(b"\r\n"), str(file), f":{number}")
        except _READ_ERRORS as error:
            raise _unreadable(file, error, number) from None


def _parse_line(line: bytes, source: str, place: str) -> Row:
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        return Row(source, place, error=f"not UTF-8 text (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return Row(source, place, error=f"not valid JSON ({_words(error)} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # numbers of 5000 digits, lists 1000 deep
        return Row(source, place, error=f"not valid JSON ({one_line(error)})")
    return _object_row(value, source, place)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a key that stands twice would lose one of its values without a word."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.40} stands twice in one object")
    return found


def _object_row(value: Any, source: str, place: str) -> Row:
    if not isinstance(value, dict):
        return Row(
            source, place, error=f"not a JSON object but {type(value).__name__}: {value!r:.60}"
        )
    return Row(source, place, data=value)


def _read_list(file: Path) -> Iterator[Row]:
    """A JSON file that holds one list of objects; where is the line on which an object begins.

    A syntax error ends the file: what follows it cannot be told apart, so it is never skipped.
    """
    with _open(file) as stream:
        try:
            text = stream.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text (byte {error.start + 1})") from None
        except _READ_ERRORS as error:
            raise _unreadable(file, error) from None
    decoder = json.JSONDecoder(object_pairs_hook=_once)
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
            raise _broken(file, text, at, one_line(error)) from None
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
