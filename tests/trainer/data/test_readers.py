"""What a data path may be: a file, a folder, the hub; and what it may not."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from s2srm.data.readers import read_rows
from s2srm.data.schema import Row
from s2srm.errors import UserError


def rows_of(path: Path | str, split: str = "train") -> list[Row]:
    return list(read_rows(str(path), split))


def _write(path: Path, value: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"p": value}) + "\n")


def test_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="holds no file ending in"):
        read_rows(str(tmp_path), "train")
    with pytest.raises(UserError, match=r"must end in \.jsonl"):
        read_rows(str(tmp_path / "x.csv"), "train")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("https://host/a.jsonl", "is a URL"),
        ("data/*.jsonl", "patterns and lists are not read"),
        ("a.jsonl,b.jsonl", "patterns and lists are not read"),
        ("~nobody-of-that-name/a.jsonl", "home directory"),
    ],
)
def test_paths_that_are_none(path: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read_rows(path, "train")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("a.csv", "write it as .jsonl"), ("a.csv.gz", "write it as .jsonl"), ("a.zip", "unpack it")],
)
def test_other_endings_are_refused_with_what_to_do(tmp_path: Path, name: str, remedy: str) -> None:
    (tmp_path / name).write_text("a,b\n")
    with pytest.raises(UserError, match=rf"must end in .*; {remedy}"):
        read_rows(str(tmp_path / name), "train")


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
