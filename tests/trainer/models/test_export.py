"""Saved folders: complete, loadable, readable by others, and never half-written."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from s2srm.models.causal import PackedCausalLM
from s2srm.models.export import exported_tensors, save_model


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


class Template:
    eos_id = 2

    def save(self, folder: Path) -> None:
        (folder / "s2srm_template.json").write_text("{}")


def save(lm: PreTrainedModel, out_dir: Path, **kwargs: Any) -> None:
    tokenizer: Any = Tokenizer()
    save_model(exported_tensors(lm), lm, tokenizer, Template(), out_dir, **kwargs)


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3-tied", "gemma2-tied"])
def test_round_trip(name: str, max_shard_bytes: int, tmp_path: Path) -> None:
    lm = PackedCausalLM(tiny_model(name)).lm
    save(lm, tmp_path, max_shard_bytes=max_shard_bytes)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for key, tensor in tiny_model(name).state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert not loaded.config._attn_implementation.startswith("s2srm")
    assert loaded.generation_config.eos_token_id == 2
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_bytes == 20_000)
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o644 for p in tmp_path.iterdir())
    assert not (tmp_path / ".saving").exists()


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    names = [name for name, _ in exported_tensors(PackedCausalLM(tiny_model("llama-tied")).lm)]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert "lm_head.weight" in dict(exported_tensors(PackedCausalLM(tiny_model("llama")).lm))


def test_a_second_save_leaves_no_old_shards_and_no_other_file_touched(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("kept\n")
    save(tiny_model("llama"), tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    save(tiny_model("llama", seed=1), tmp_path)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, tiny_model("llama", seed=1).lm_head.weight)
    assert (tmp_path / "metrics.jsonl").read_text() == "kept\n"


def test_a_save_that_breaks_leaves_the_old_model(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)

    def broken(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        for i, item in enumerate(exported_tensors(lm)):
            if i == 5:
                raise RuntimeError("power cut")
            yield item

    lm, tokenizer = tiny_model("llama", seed=1), Tokenizer()
    with pytest.raises(RuntimeError, match="power cut"):
        save_model(broken(lm), lm, tokenizer, Template(), tmp_path, max_shard_bytes=9_000)  # pyright: ignore
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, tiny_model("llama").lm_head.weight)
    save(lm, tmp_path)
    assert not (tmp_path / ".saving").exists()


def test_extra_files_and_index_total(tmp_path: Path) -> None:
    lm = tiny_model("llama")
    extra = {"score_head.safetensors": {"weight": torch.ones(1, 32)}}
    save(lm, tmp_path, extra=extra, max_shard_bytes=20_000)
    assert (tmp_path / "score_head.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in lm.parameters())
    assert set(index["weight_map"]) == set(lm.state_dict())
