"""Rows with their places, and what cannot be read named by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from s2srm.data.readers import looks_like_path, read_rows
from s2srm.data.schema import Row
from s2srm.errors import UserError


def rows_of(path: Path | str, split: str = "train") -> list[Row]:
    return list(read_rows(str(path), split))


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


def test_parquet_keeps_values_and_writes_no_cache(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    values = [
        {"p": "x", "m": [{"role": "user", "content": "é"}]},
        {"p": None, "m": [{"role": "user", "content": "\r\n"}]},
    ]
    datasets.Dataset.from_list(values).to_parquet(str(file))
    rows = rows_of(file)
    assert [r.data for r in rows] == values
    assert [r.where for r in rows] == [f"{file} row 0", f"{file} row 1"]
    assert list(tmp_path.iterdir()) == [file]


def test_file_that_is_not_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_text("not parquet at all")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as Parquet \(") as caught:
        rows_of(file)
    assert "\n" not in str(caught.value)


def _write(path: Path, value: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"p": value}) + "\n")


def test_folder_by_split(tmp_path: Path) -> None:
    for name in ("train-00001-of-00002", "train-00000-of-00002", "validation", "test"):
        _write(tmp_path / "data" / f"{name}.jsonl", name)
    (tmp_path / "README.md").write_text("no data")
    assert [r.data["p"] for r in rows_of(tmp_path)] == [
        "train-00000-of-00002",
        "train-00001-of-00002",
    ]
    assert [r.data["p"] for r in rows_of(tmp_path, "dev")] == ["validation"]
    assert [r.data["p"] for r in rows_of(tmp_path, "validation")] == ["validation"]
    with pytest.raises(UserError, match=r"split 'extra': .* found data/test\.jsonl, data/train-0"):
        rows_of(tmp_path, "extra")


def test_folder_of_parts_is_the_train_split(tmp_path: Path) -> None:
    for name in ("part1", "part2"):
        _write(tmp_path / f"{name}.jsonl", name)
    assert [r.data["p"] for r in rows_of(tmp_path)] == ["part1", "part2"]
    assert [r.data["p"] for r in rows_of(tmp_path, "part2")] == ["part2"]
    with pytest.raises(UserError, match="no file of that split"):
        rows_of(tmp_path, "dev")


def test_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="holds no file ending in"):
        read_rows(str(tmp_path), "train")
    with pytest.raises(UserError, match=r"must end in \.jsonl"):
        read_rows(str(tmp_path / "x.csv"), "train")


def test_missing_path_never_reaches_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "runs" / "train.jsonl", "x")
    for path in ("./a", "../a/b", str(tmp_path / "no"), "a.jsonl", "a/b/c", "~/nothere", "runs/x"):
        with pytest.raises(UserError, match="does not exist"):
            read_rows(path, "train")
    with pytest.raises(UserError, match=r"did you mean 'runs/train\.jsonl'"):
        read_rows("runs/trian.jsonl", "train")
    with pytest.raises(UserError, match="is not set"):
        read_rows("", "train")


@pytest.mark.parametrize("name", ["imdb", "Anthropic/hh-rlhf", "openai/summarize_from_feedback"])
def test_hub_names_are_no_paths(name: str) -> None:
    assert not looks_like_path(name)


def test_hub_rows_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load(name: str, subset: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        if name == "owner/gone":
            raise ConnectionError("no\nnetwork")
        return datasets.Dataset.from_list([{"p": 1}, {"p": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_rows("owner/name", "dev", "sub"))
    assert [r.where for r in rows] == ["owner/name/sub[dev] row 0", "owner/name/sub[dev] row 1"]
    assert asked == [("owner/name", "sub", "dev")]
    with pytest.raises(UserError, match=r"'owner/gone' is neither .* \(no network\)"):
        rows_of("owner/gone")
