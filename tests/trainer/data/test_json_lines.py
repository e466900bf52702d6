"""JSON text, plain and compressed: every row with its line, every broken file named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from s2srm.data.json_lines import read_json
from s2srm.data.schema import Row
from s2srm.errors import UserError


def rows_of(path: Path) -> list[Row]:
    return list(read_json(path))


def test_json_lines_with_every_odd_line(tmp_path: Path) -> None:
    """BOM, CRLF, empty lines, line separators inside strings, no newline at the end."""
    file = tmp_path / "a.jsonl"
    text = '\ufeff{"p": "one\u2028two\x85"}\r\n\r\n   \n{"p": {"q": [1, null]}}\n{"p": 1' + "0" * 40
    file.write_bytes((text + "}").encode())
    rows = rows_of(file)
    assert [r.where for r in rows] == [f"{file}:{n}" for n in (1, 4, 5)]
    assert [r.data["p"] for r in rows] == ["one\u2028two\x85", {"q": [1, None]}, 10**40]
    assert all(r.error is None for r in rows)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"p": "x"', "not valid JSON (Expecting ',' delimiter at column 10)"),
        (b"{'p': 1}", "not valid JSON (Expecting property name"),
        (b'{"p": "\xff"}', "not UTF-8 text (byte 8 of the line)"),
        (b'["p"]', "not a JSON object but list: ['p']"),
        (b"null", "not a JSON object but NoneType"),
        (b'{"p": ' + b"9" * 5000 + b"}", "not valid JSON (Exceeds the limit"),
        (b"[" * 100_000, "not valid JSON (maximum recursion"),
    ],
)
def test_broken_line_between_good_ones(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"p": 1}\n' + line + b'\n{"p": 3}\n')
    good, bad, after = rows_of(file)
    assert (good.data, after.data) == ({"p": 1}, {"p": 3})
    assert bad.where == f"{file}:2"
    assert bad.error is not None
    assert bad.error.startswith(reason)
    assert "\n" not in bad.error


def test_json_list_knows_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('\n[{"p": "]"},\n\n  {"p":\n 2}, 3\n ]\n')
    rows = rows_of(file)
    assert [r.where for r in rows] == [f"{file}:{n}" for n in (2, 4, 5)]
    assert [r.data for r in rows] == [{"p": "]"}, {"p": 2}, {}]
    assert rows[2].error == "not a JSON object but int: 3"


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[{"p": 1},\n{"p" 2}]', 2, "Expecting ':' delimiter"),
        ('[{"p": 1},\n]', 2, "Expecting value"),
        ('[{"p": 1}\n{"p": 2}]', 2, "expected ',' or ']'"),
        ('[{"p": 1}', 1, "expected ',' or ']'"),
        ("[", 1, "Expecting value"),
        ('[{"p": 1}]\n\nrest', 3, "text after the end of the list"),
    ],
)
def test_broken_json_list(tmp_path: Path, text: str, line: int, reason: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        rows_of(file)
    assert str(caught.value) == f"{file}:{line}: not valid JSON ({reason})"


def test_json_file_of_lines_and_empty_list(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"p": 1}\n{"p": 2}\n')
    assert [r.data["p"] for r in rows_of(file)] == [1, 2]
    file.write_text("\ufeff[ ]", encoding="utf-8")
    assert rows_of(file) == []


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", '{\n "v": 1,\n "data": [{"p": 1}]\n}', "with the keys 'v', 'data'"),
        ("a.jsonl", '{\n "p": 1\n}', "one JSON object with the keys 'p'"),
        ("a.jsonl", '{\n "p": 1\n}\n{\n "p": 2\n}', "objects that span several lines"),
        ("a.jsonl", '[\n{"p": 1}\n]', "holds one JSON list and not one object a line"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        ("a.jsonl", "<!DOCTYPE html>", "is HTML or XML"),
        ("a.jsonl", "PAR1\x00", "is a Parquet file"),
    ],
)
def test_other_kinds_of_file_are_named(tmp_path: Path, name: str, text: str, reason: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        rows_of(file)
    assert str(caught.value).startswith(str(file))
    assert reason in str(caught.value)


def test_a_broken_first_line_is_a_bad_row_in_either_kind_of_file(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        for first in ("{", '{"p": 1} more', '{"p": '):
            file = tmp_path / name
            file.write_text(first + '\n{"p": 1}\n')
            bad, good = rows_of(file)
            assert (bad.where, good.data) == (f"{file}:1", {"p": 1})
            assert bad.error is not None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf16_is_named(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"p": 1}\n'.encode(encoding))
    with pytest.raises(UserError, match="is UTF-16 text"):
        rows_of(file)


def test_a_key_twice_is_a_bad_row(tmp_path: Path) -> None:
    """json keeps the last one without a word."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"p": {"q": 1, "q": 1}}\n{"p": 1}\n')
    bad, good = rows_of(file)
    assert bad.error == "not valid JSON (the key 'q' stands twice in one object)"
    assert good.data == {"p": 1}


def _zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


_PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": _zstd,
    ".zstd": _zstd,
}


@pytest.mark.parametrize("ending", _PACKERS)
def test_compressed_files(tmp_path: Path, ending: str) -> None:
    pack = _PACKERS[ending]
    lines = "".join(json.dumps({"p": number}) + "\n" for number in range(3))
    file = tmp_path / f"A.JSONL{ending}"
    file.write_bytes(pack(lines.encode()) + pack(b"\n[]\n"))
    *good, bad = rows_of(file)
    assert [(r.where, r.data) for r in good] == [(f"{file}:{n + 1}", {"p": n}) for n in range(3)]
    assert (bad.where, bad.error) == (f"{file}:5", "not a JSON object but list: []")
    listed = tmp_path / f"b.json{ending}"
    listed.write_bytes(pack(b'[\n{"p": 1}]'))
    assert [(r.where, r.data) for r in rows_of(listed)] == [(f"{listed}:2", {"p": 1})]


@pytest.mark.parametrize("ending", _PACKERS)
def test_broken_archives(tmp_path: Path, ending: str) -> None:
    """A half is never read as if it were the whole, and what is packed is not read as text."""
    packed = _PACKERS[ending](b"".join(b'{"p": %d}\n' % n**9 for n in range(20_000)))
    file = tmp_path / f"a.jsonl{ending}"
    for content in (packed[: len(packed) // 2], b'{"p": 1}\n'):
        file.write_bytes(content)
        with pytest.raises(UserError, match="cannot be unpacked by") as caught:
            rows_of(file)
        assert str(caught.value).startswith(str(file))
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(packed)
    with pytest.raises(UserError, match=rf"is compressed by .* name it with \{ending[:4]}"):
        rows_of(plain)
