"""A model folder that is incomplete or of another kind: one line, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import save_tiny

from s2srm.errors import UserError
from s2srm.models.files import INDEX, WEIGHTS, check_folder, check_tokenizer, check_weights


def check(folder: Path) -> None:
    check_folder(str(folder), "model.path")
    check_weights(str(folder), "model.path")


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        check(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("files") / "llama")


@pytest.fixture
def llama(saved: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def sharded(folder: Path) -> Path:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    for name in names.values():
        (folder / name).write_bytes(whole)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def test_whole_folders_and_hub_names_pass(llama: Path) -> None:
    check(llama)
    check(sharded(llama))
    check_folder("someone/some-model", "model.path")
    check_weights("someone/some-model", "model.path")


def test_a_folder_without_a_tokenizer(llama: Path) -> None:
    with pytest.raises(UserError, match=r"^model.path \S*/llama: no tokenizer in this folder"):
        check_tokenizer(str(llama), "model.path")
    for name in ("tokenizer.json", "vocab.json", "spiece.model"):
        (llama / name).write_text("{}")
        check_tokenizer(str(llama), "model.path")
        (llama / name).unlink()
    check_tokenizer("someone/some-model", "model.path")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
)
@pytest.mark.parametrize(
    "text, words", [("", "is empty"), ("{", "not valid JSON"), ("[]", "a list")]
)
def test_broken_json(llama: Path, name: str, text: str, words: str) -> None:
    (llama / name).write_text(text)
    assert f"{name}: " in refused(llama) and words in refused(llama)


def test_config_that_names_no_architecture(llama: Path) -> None:
    (llama / "config.json").write_text('{"hidden_size": 32}')
    assert "config.json: no model_type" in refused(llama)


def test_adapters_and_other_formats(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "LoRA adapter only" in refused(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "model-q4.gguf").write_text("")
    assert "GGUF" in refused(tmp_path)


def test_no_weights_or_pickled_ones(llama: Path) -> None:
    (llama / WEIGHTS).unlink()
    assert "no weights: neither model.safetensors" in refused(llama)
    (llama / "tf_model.h5").write_text("")
    assert "found tf_model.h5" in refused(llama)
    (llama / "pytorch_model.bin").write_text("")
    assert "pickled (pytorch_model.bin)" in refused(llama)


def test_broken_weights(llama: Path) -> None:
    (llama / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "Git LFS pointer" in refused(llama)
    (llama / WEIGHTS).write_bytes(b"")
    assert f"{WEIGHTS}: broken weights file" in refused(llama)


def test_broken_shards(llama: Path) -> None:
    sharded(llama)
    (llama / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors, which" in refused(llama)
    (llama / INDEX).write_text('{"weight_map": {}}')
    assert f"{INDEX}: no weight_map" in refused(llama)
    (llama / INDEX).write_text("")
    assert f"{INDEX}: the file is empty" in refused(llama)


def test_broken_score_head(llama: Path) -> None:
    (llama / "score_head.safetensors").write_bytes(b"xx")
    assert "score_head.safetensors: broken" in refused(llama)
