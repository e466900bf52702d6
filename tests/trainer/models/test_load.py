"""Loading: what cannot be loaded is one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB, save_tiny, tiny_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, PreTrainedTokenizerFast

from s2srm.config import ModelConfig
from s2srm.data.encoding import encode_text
from s2srm.errors import UserError
from s2srm.models.load import load_causal_lm, load_config, load_tokenizer, load_value_model
from s2srm.packing import Segment, pack


def save_tokenizer(folder: Path, num_words: int) -> None:
    words = {f"w{i}": i for i in range(num_words)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(folder)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "llama")


@pytest.mark.parametrize("form", ["{tmp}/nowhere", "./nowhere", "~/no/where", "a/b/c", "tests/x"])
def test_missing_folder(form: str, tmp_path: Path) -> None:
    path = form.format(tmp=tmp_path)
    with pytest.raises(UserError, match=f"^model.path {path}: no such folder$"):
        load_config(ModelConfig(path=path))


def test_empty_path_file_and_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^policy\.path is empty"):
        load_config(ModelConfig(), "policy.path")
    with pytest.raises(UserError, match=r"no config\.json in this folder"):
        load_config(ModelConfig(path=str(tmp_path)))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        load_config(ModelConfig(path=str(tmp_path / "file")))


def test_broken_config(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    with pytest.raises(UserError, match="llama"):
        load_config(ModelConfig(path=str(llama)))
    (llama / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(UserError, match="no-such-thing") as caught:
        load_config(ModelConfig(path=str(llama)))
    assert "\n" not in str(caught.value)


def test_other_kinds_of_models(tmp_path: Path, llama: Path) -> None:
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="a vit model is not a causal language model"):
        load_config(ModelConfig(path=str(tmp_path / "vit")))
    edit_config(llama, quantization_config={"quant_method": "gguf"})
    with pytest.raises(UserError, match="quantised"):
        load_config(ModelConfig(path=str(llama)))


@pytest.mark.parametrize("keep", [0, 5, 1000])
def test_truncated_weights_name_the_file(llama: Path, keep: int) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: broken weights file"):
        load_config(ModelConfig(path=str(llama)))


def test_no_weights_at_all(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(UserError, match="llama") as caught:
        load_causal_lm(ModelConfig(path=str(llama)), train=False)
    assert "\n" not in str(caught.value)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "m")
    tiny_config("llama", num_hidden_layers=3).save_pretrained(folder)
    with pytest.raises(UserError, match=r"missing keys model\.layers\.2\."):
        load_causal_lm(ModelConfig(path=str(folder)), train=False)


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "m")
    tiny_config("llama", intermediate_size=64).save_pretrained(folder)
    with pytest.raises(UserError, match=r"mismatched keys .*gate_proj") as caught:
        load_causal_lm(ModelConfig(path=str(folder)), train=False)
    assert "\n" not in str(caught.value)


def test_tokenizer_larger_than_the_model(llama: Path) -> None:
    save_tokenizer(llama, VOCAB)
    assert load_tokenizer(ModelConfig(path=str(llama))).eos_token_id == 2
    save_tokenizer(llama, VOCAB + 3)
    with pytest.raises(UserError, match=r"largest id is 63, .* only 61 rows"):
        load_tokenizer(ModelConfig(path=str(llama)))


def test_folder_without_tokenizer(llama: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(ModelConfig(path=str(llama)))
    assert "llama" in str(caught.value) and "\n" not in str(caught.value)


def test_precision_dropout_and_gradients(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "m", attention_dropout=0.5)
    cfg = ModelConfig(path=str(folder), precision="float64")
    model = load_causal_lm(cfg, train=True)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(p.requires_grad for p in model.parameters())
    batch = pack([Segment([3, 4, 5, 6], 1)])
    model.train()
    first, second = model(batch, "logprobs").logprobs, model(batch, "logprobs").logprobs
    assert torch.equal(first, second)
    frozen = load_causal_lm(cfg, train=False)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_value_model_needs_a_score_head_when_asked(llama: Path) -> None:
    cfg = ModelConfig(path=str(llama))
    with pytest.raises(UserError, match=r"no score_head.safetensors"):
        load_value_model(cfg, train=False, init="saved")
    model = load_value_model(cfg, train=True)
    assert float(model.score.weight.abs().sum()) == 0


def test_encoder_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    config.save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="bert"):
        load_causal_lm(ModelConfig(path=str(tmp_path / "bert")), train=False)


def test_special_token_beyond_the_model_does_no_harm(llama: Path) -> None:
    """As Gemma 3's image token, which its text models have no row for."""
    save_tokenizer(llama, VOCAB)
    config = ModelConfig(path=str(llama))
    tokenizer = load_tokenizer(config)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(llama)
    again = load_tokenizer(config)
    assert again.convert_tokens_to_ids("<image>") == VOCAB
    assert VOCAB not in encode_text(again, "w1 <image> w2")
