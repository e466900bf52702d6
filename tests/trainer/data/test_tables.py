"""Rows of Parquet and Arrow files and of what save_to_disk wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from s2srm.config import DataConfig
from s2srm.data.loading import load_demonstrations
from s2srm.data.readers import read_rows
from s2srm.data.schema import Message, Row
from s2srm.errors import UserError


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    datasets.disable_progress_bars()


def rows_of(path: Path, split: str = "train") -> list[Row]:
    return list(read_rows(str(path), split))


def values_of(path: Path, split: str = "train") -> list[Any]:
    return [row.data["p"] for row in rows_of(path, split)]


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


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_pointer_of_git_lfs(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a{ending}"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(UserError, match="run `git lfs pull`"):
        rows_of(file)


def test_types_of_arrow(tmp_path: Path) -> None:
    """Categories, large strings and columns of null are values; images are not decoded."""
    file = tmp_path / "a.parquet"
    table = pyarrow.table(
        {
            "p": pyarrow.array(["x", "y", "x"]).dictionary_encode(),
            "q": pyarrow.array(["a", None, "c"], pyarrow.large_string()),
            "none": pyarrow.nulls(3),
        }
    )
    pyarrow.parquet.write_table(table, file)
    assert [tuple(r.data.values()) for r in rows_of(file)] == [
        ("x", "a", None),
        ("y", None, None),
        ("x", "c", None),
    ]


def test_saved_dataset(tmp_path: Path) -> None:
    """One data set is split train; it is read in its own order and from all its shards."""
    rows = datasets.Dataset.from_list([{"p": n} for n in range(5)]).select([3, 1, 4])
    rows.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert values_of(tmp_path / "one") == [3, 1, 4]
    assert [r.where for r in rows_of(tmp_path / "one")][-1] == f"{tmp_path / 'one'} row 2"
    with pytest.raises(UserError, match=r"split 'test': .* one data set written by save_to_disk"):
        rows_of(tmp_path / "one", "test")
    shard = next((tmp_path / "one").glob("data-*.arrow"))
    shard.write_bytes(b"x")
    with pytest.raises(UserError, match=r"one: was written by save_to_disk and cannot be read \("):
        rows_of(tmp_path / "one")


def test_saved_dict_of_splits(tmp_path: Path) -> None:
    parts = {n: datasets.Dataset.from_list([{"p": n}]) for n in ("train", "validation", "extra")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path))
    for split, value in (("train", "train"), ("dev", "validation"), ("extra", "extra")):
        assert values_of(tmp_path, split) == [value]
    with pytest.raises(UserError, match=r"split 'test': .* found extra, train, validation"):
        rows_of(tmp_path, "test")


def test_arrow_files_of_the_cache(tmp_path: Path) -> None:
    for name in ("train", "test"):
        file = str(tmp_path / f"json-{name}.arrow")
        with datasets.arrow_writer.ArrowWriter(path=file) as writer:
            writer.write({"p": name})
            writer.finalize()
    (tmp_path / "dataset_info.json").write_text("{}")
    assert (values_of(tmp_path), values_of(tmp_path, "test")) == (["train"], ["test"])


def test_sequence_of_structs_is_messages(tmp_path: Path) -> None:
    """Such a column comes back as one object of lists."""
    text = datasets.Value("string")
    features = datasets.Features({"messages": datasets.Sequence({"role": text, "content": text})})
    column = [{"role": ["user", "assistant"], "content": ["Hi", "Hello"]}]
    rows = datasets.Dataset.from_dict({"messages": column}, features=features)
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        (found,), _ = load_demonstrations(DataConfig(path=str(path)))
        assert (found.prompt, found.response) == ((Message("user", "Hi"),), "Hello")
