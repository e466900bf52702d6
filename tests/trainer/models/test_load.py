"""Loading: what cannot be loaded is one clear line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, save_tiny, tiny_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    DbrxConfig,
    GitConfig,
    OPTConfig,
    PhimoeConfig,
    PreTrainedTokenizerFast,
)

from s2srm.config import ModelConfig
from s2srm.data.encoding import encode_text
from s2srm.errors import UserError
from s2srm.models.load import (
    disable_dropout,
    load_causal_lm,
    load_config,
    load_tokenizer,
    load_value_model,
)
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
    shown = os.path.expanduser(path)
    with pytest.raises(UserError, match=f"^model.path {shown}: no such folder$"):
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
    BartConfig(vocab_size=VOCAB).save_pretrained(tmp_path / "bart")
    with pytest.raises(UserError, match="bart is an encoder-decoder"):
        load_config(ModelConfig(path=str(tmp_path / "bart")))
    BertConfig(vocab_size=VOCAB).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="bert is an encoder"):
        load_config(ModelConfig(path=str(tmp_path / "bert")))
    GitConfig().save_pretrained(tmp_path / "git")
    with pytest.raises(UserError, match="git is multi-modal"):
        load_config(ModelConfig(path=str(tmp_path / "git")))
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


def test_home_folder(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(llama.parent))
    save_tokenizer(llama, VOCAB)
    cfg = ModelConfig(path="~/llama")
    assert cfg.path == str(llama)
    assert load_config(cfg).model_type == "llama"
    assert load_tokenizer(cfg).eos_token_id == 2
    load_causal_lm(cfg, train=False)


@pytest.mark.parametrize("token, used", [("</s>", True), ("<|im_end|>", True), ("<image>", False)])
def test_special_token_that_is_used_needs_a_row(llama: Path, token: str, used: bool) -> None:
    save_tokenizer(llama, VOCAB)
    cfg = ModelConfig(path=str(llama))
    tokenizer = load_tokenizer(cfg)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.chat_template = "{{ messages[0]['content'] + '<|im_end|>' }}"
    if token == "</s>":
        tokenizer.eos_token = token
    tokenizer.save_pretrained(llama)
    if not used:
        load_tokenizer(cfg)
        return
    with pytest.raises(UserError, match=r"largest id is 61, .*resize_token_embeddings\(62\)"):
        load_tokenizer(cfg)


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


@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "LlamaForTokenClassification"])
def test_checkpoints_with_another_head(llama: Path, kind: str) -> None:
    edit_config(llama, architectures=[kind])
    with pytest.raises(UserError, match=f"holds a {kind}, which has no language-model head"):
        load_config(ModelConfig(path=str(llama)))


def test_pad_token_outside_the_vocabulary(llama: Path) -> None:
    edit_config(llama, pad_token_id=VOCAB)
    with pytest.raises(UserError, match=rf"pad_token_id is {VOCAB} .*only {VOCAB} rows"):
        load_config(ModelConfig(path=str(llama)))


@pytest.mark.parametrize("number, word", [(float("nan"), "NaN"), (float("-inf"), "infinity")])
def test_weights_that_are_not_finite_are_called_so(llama: Path, number: float, word: str) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = number
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    for load in (load_causal_lm, load_value_model):
        with pytest.raises(UserError, match=rf"hold {word} \(tensor model\.layers\.1\.mlp\.up_pr"):
            load(ModelConfig(path=str(llama)), train=True)


class Surprise(Exception):
    """What a library may raise that nobody has foreseen."""


@pytest.mark.parametrize(
    "error", [AssertionError(), AttributeError("a\nb"), Surprise("c"), KeyError("d")]
)
def test_whatever_transformers_raises_is_one_line(
    llama: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    cfg = ModelConfig(path=str(llama))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(UserError) as caught:
        load_causal_lm(cfg, train=True)
    text = str(caught.value)
    assert str(llama) in text and "llama" in text and type(error).__name__ in text
    assert "\n" not in text


def test_tokenizer_of_another_version(llama: Path) -> None:
    save_tokenizer(llama, VOCAB)
    path = llama / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["type"] = "FutureBPE"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="llama: tokenizer: cannot be loaded") as caught:
        load_tokenizer(ModelConfig(path=str(llama)))
    assert "\n" not in str(caught.value)


def test_dropout_is_off_wherever_it_is_named() -> None:
    config = DbrxConfig(resid_pdrop=0.1, attn_config={"attn_pdrop": 0.2})
    disable_dropout(config)
    assert config.resid_pdrop == 0.0 and config.attn_config.attn_pdrop == 0.0
    config = OPTConfig(layerdrop=0.3, dropout=0.1)
    disable_dropout(config)
    assert config.layerdrop == 0.0 and config.dropout == 0.0
    config = PhimoeConfig(input_jitter_noise=0.1)
    disable_dropout(config)
    assert config.input_jitter_noise == 0.0


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
