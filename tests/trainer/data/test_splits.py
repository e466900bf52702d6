"""Which files of a folder a split reads: held-out rows never come into training."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from s2srm.data.readers import read_rows
from s2srm.data.schema import Row
from s2srm.data.splits import split_files
from s2srm.errors import UserError


def rows_of(path: Path | str, split: str = "train") -> list[Row]:
    return list(read_rows(str(path), split))


def chosen(folder: Path, split: str) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in split_files(folder, split)]


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n")


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


@pytest.mark.parametrize(
    ("train", "split", "held_out"),
    [
        ("hh_train.jsonl", "test", "hh_test.jsonl"),
        ("prefs-train.jsonl", "validation", "prefs-validation.jsonl"),
        ("hh.train.jsonl", "dev", "hh.val.jsonl"),
        ("train_prefs.jsonl", "test", "test_prefs.jsonl"),
        ("HH_Train.JSONL", "test", "HH_TEST.JSONL"),
        ("hhTrain.json", "test", "hhTest.json"),
        ("trainset.jsonl.gz", "dev", "devset.jsonl.zst"),
        ("a_train.jsonl", "heldout", "a_held_out.jsonl"),
        ("a_train.jsonl", "held-out", "a_heldout.jsonl"),
        ("a_train.jsonl", "holdout", "a-hold-out.jsonl"),
        ("prompts_train.jsonl", "ood", "prompts_ood.jsonl"),
        ("a_training.jsonl", "eval", "a_evaluation_eval.jsonl"),
        ("train/part.jsonl", "test", "test/part.jsonl"),
        ("data/train/0.parquet", "validation", "data/valid/0.parquet"),
        ("train_sft-00000-of-00001.parquet", "test", "test_sft-00000-of-00001.parquet"),
        ("json-train.arrow", "test", "json-test.arrow"),
    ],
)
def test_splits_are_kept_apart(tmp_path: Path, train: str, split: str, held_out: str) -> None:
    fill(tmp_path, [train, held_out, "README.md", "dataset_infos.json", ".hidden.jsonl"])
    assert (chosen(tmp_path, "train"), chosen(tmp_path, split)) == ([train], [held_out])


def test_words_that_only_look_like_splits(tmp_path: Path) -> None:
    names = ["contest.jsonl", "latest.jsonl", "trainer_notes.jsonl", "value.jsonl"]
    fill(tmp_path, names)
    assert chosen(tmp_path, "train") == names
    with pytest.raises(UserError, match="no file of that split; found contest"):
        chosen(tmp_path, "test")


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.jsonl", "extra.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "extra.jsonl"], "extra", ["extra.jsonl"]),
        (["train_prefs.jsonl", "train_sft.jsonl"], "train_prefs", ["train_prefs.jsonl"]),
        (["train.jsonl", "train_sft.jsonl"], "train", ["train.jsonl"]),
        (["hh_train.jsonl", "tldr_train.jsonl"], "train", ["hh_train.jsonl", "tldr_train.jsonl"]),
        (["train_1.jsonl", "train_2.jsonl.gz"], "train", ["train_1.jsonl", "train_2.jsonl.gz"]),
        (["train/a.jsonl", "train/b.jsonl"], "train", ["train/a.jsonl", "train/b.jsonl"]),
        (["val.jsonl", "eval.jsonl"], "eval", ["eval.jsonl"]),
        (["metadata.json", "state.json", "x.json"], "train", ["x.json"]),
    ],
)
def test_the_files_of_a_split(
    tmp_path: Path, names: list[str], split: str, expected: list[str]
) -> None:
    fill(tmp_path, names)
    assert chosen(tmp_path, split) == expected


@pytest.mark.parametrize(
    ("names", "split", "reason"),
    [
        (["evaluation_train.jsonl", "train.jsonl"], "train", r"two splits \(dev and train\)"),
        (["train/test.jsonl"], "test", r"two splits \(test and train\)"),
        (["train_prefs.jsonl", "train_sft.jsonl"], "train", "could be train_prefs or train_sft"),
        (["val.jsonl", "eval.jsonl"], "dev", "could be eval or val"),
        (["a.jsonl", "test.jsonl"], "train", r"no file of that split; found a\.jsonl, test\.jsonl"),
        (["a.jsonl", "a.parquet"], "train", r"a\.jsonl and a\.parquet, which may hold the same"),
        (["train.jsonl", "train.jsonl.gz"], "train", "may hold the same rows"),
        (["train.json", "train.jsonl"], "train", "may hold the same rows"),
        (["hh/train.jsonl"], "train", r"nor a sub-folder called data .*; found hh/"),
    ],
)
def test_what_is_left_open_is_refused(
    tmp_path: Path, names: list[str], split: str, reason: str
) -> None:
    fill(tmp_path, names)
    with pytest.raises(UserError, match=reason) as caught:
        chosen(tmp_path, split)
    assert str(tmp_path) in str(caught.value)


def test_the_log_says_what_is_read_and_what_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, ["hh_train.jsonl", "hh_test.jsonl", "more.jsonl", "train.csv"])
    with caplog.at_level(logging.INFO, logger="s2srm"):
        chosen(tmp_path, "train")
    assert caplog.messages == [
        f"{tmp_path}: split 'train' reads hh_train.jsonl; "
        "not read: hh_test.jsonl, more.jsonl, train.csv"
    ]


def test_a_file_that_is_named_itself_is_read_whatever_the_split(tmp_path: Path) -> None:
    fill(tmp_path, ["hh_test.jsonl"])
    assert len(rows_of(tmp_path / "hh_test.jsonl", "train")) == 1


def test_links_to_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "gone")
    for path in (tmp_path, tmp_path / "train.jsonl"):
        with pytest.raises(UserError, match=r"is a link to '.*gone', which is gone"):
            rows_of(path)
