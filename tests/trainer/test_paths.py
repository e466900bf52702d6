"""A path, or a name on the hub: one rule for data and models."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2srm.config import DataConfig, ModelConfig
from s2srm.data.readers import read_rows
from s2srm.errors import UserError
from s2srm.models.files import check_folder
from s2srm.paths import exists, looks_like_path, nearest_entry
from s2srm.validation import data, model


@pytest.mark.parametrize("name", ["imdb", "Anthropic/hh-rlhf", "openai/summarize_from_feedback"])
def test_hub_names_are_no_paths(name: str) -> None:
    assert not looks_like_path(name)


@pytest.mark.parametrize(
    "name",
    ["./a", "../a", "/a", "~/a", "a/b/c", "a\\b", "a*", "a.jsonl", "b/A.JSON.gz", "a.csv", "runs/"],
)
def test_what_can_only_be_a_path(name: str) -> None:
    assert looks_like_path(name)


def test_a_name_in_a_folder_that_is_here_is_a_path_to_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not looks_like_path("runs/sft")
    (tmp_path / "runs").mkdir()
    assert looks_like_path("runs/sft")
    with pytest.raises(UserError, match=r"data\.path: runs/sft does not exist"):
        data("data", DataConfig(path="runs/sft"))
    with pytest.raises(UserError, match=r"model\.path: runs/sft does not exist"):
        model("model", ModelConfig(path="runs/sft"))
    with pytest.raises(UserError, match="does not exist"):
        read_rows("runs/sft", "train")
    with pytest.raises(UserError, match="no such folder"):
        check_folder("runs/sft", "model.path")


def test_a_name_that_no_file_can_have_does_not_exist(tmp_path: Path) -> None:
    assert exists(tmp_path) and not exists(tmp_path / "no")
    for name in ("x" * 5000, "nul\0byte", "x" * 5000 + "/y", "nul\0/y"):
        assert not exists(name) and isinstance(looks_like_path(name), bool)
        assert nearest_entry(Path(name)) in ("", f": there is no folder {name[:-2]!r} either")


def test_the_hint_names_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    hint = f"; did you mean {str(tmp_path / 'train.jsonl')!r}?"
    assert nearest_entry(tmp_path / "trian.jsonl") == hint
    with pytest.raises(UserError, match=r"does not exist; did you mean '.*/train\.jsonl'\?"):
        data("data", DataConfig(path=str(tmp_path / "trian.jsonl")))
    assert "patterns and lists are not read" in nearest_entry(tmp_path / "*.jsonl")
    assert "there is no folder" in nearest_entry(tmp_path / "no" / "x.jsonl")
