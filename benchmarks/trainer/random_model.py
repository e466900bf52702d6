"""Models of a real one's shape with random weights, as folders that the trainer loads."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from s2srm.config import TemplateConfig
from s2srm.data.templates import Template

TEMPLATE = TemplateConfig("plain", " a ")
SHAPES: dict[str, PretrainedConfig] = {
    # google/gemma-2b: 2,506,172,416 parameters.
    "gemma-2b": GemmaConfig(
        vocab_size=256000,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    ),
    "tiny": GemmaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    ),
}


def write_model(shape: str, folder: Path, dtype: torch.dtype, device: torch.device) -> Path:
    """Weights from N(0, 0.02), as transformers initialises them, made on the device."""
    config = SHAPES[shape]
    torch.manual_seed(0)
    with device:
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lm.save_pretrained(folder)
    tokenizer = _tokenizer(config)
    tokenizer.save_pretrained(folder)
    Template.build(tokenizer, TEMPLATE).save(folder)
    return folder


def write_prompts(shape: str, file: Path, count: int, tokens: int) -> Path:
    """Prompts of so many random words each, all alike in length."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(64, SHAPES[shape].vocab_size, (count, tokens), generator=generator)
    rows = [{"prompt": " ".join(f"w{i}" for i in row)} for row in ids.tolist()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def _tokenizer(config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """A word for every id."""
    special = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}
    words = [*special.values(), *string.ascii_lowercase]
    words += [f"w{i}" for i in range(len(words), config.vocab_size)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {f"{name}_token": word for name, word in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=core, **tokens)
