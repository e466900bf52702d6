"""Tiny models and a word tokenizer for tests of PPO and its rewards, as objects or as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from s2srm.config import (
    CriticConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    TemplateConfig,
)
from s2srm.data.templates import Template
from s2srm.engine.torch_engine import TorchEngine
from s2srm.models.attention import SDPA
from s2srm.models.causal import PackedCausalLM
from s2srm.models.value import PackedValueModel

VOCAB, EOS = 29, 2
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [*SPECIAL, *(chr(ord("a") + i) for i in range(VOCAB - len(SPECIAL)))]
SEPARATOR = " x y"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter-word, four special ones; pad is EOS."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )


def template() -> Template:
    """Plain, with a separator of two tokens."""
    return Template.build(tokenizer(), TemplateConfig("plain", SEPARATOR))


def lm(
    name: str = "llama", *, seed: int = 0, scale: float = 8.0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """llama, llama-tied or gemma3-tied (sliding window 4) with visibly different logits."""
    family, _, tied = name.partition("-")
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "tie_word_embeddings": tied == "tied",
    }
    config: Any = LlamaConfig(**common)
    if family == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(**common, head_dim=8, sliding_window=4, layer_types=layers)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() > 1 else 1.0)
    return model.to(dtype).eval()


def causal_engine(model: PreTrainedModel, optim: OptimConfig | None = None) -> TorchEngine:
    model.set_attn_implementation(SDPA)
    return TorchEngine(PackedCausalLM(model), optim, 100)


def value_engine(
    model: PreTrainedModel, optim: OptimConfig | None = None, seed: int | None = None
) -> TorchEngine:
    """seed: a random score head; None: zero."""
    model.set_attn_implementation(SDPA)
    value = PackedValueModel(model, "zero" if seed is None else "normal", seed or 0)
    return TorchEngine(value, optim, 100)


def save_folder(model: PreTrainedModel, folder: Path, score_seed: int | None = None) -> Path:
    """What the stages leave: weights, tokenizer, template, perhaps a score head."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    template().save(folder)
    if score_seed is not None:
        from safetensors.torch import save_file

        value = PackedValueModel(model, "normal", score_seed)
        tensors = {n: p.detach().clone() for n, p in value.score.named_parameters()}
        save_file(tensors, folder / "score_head.safetensors")
    return folder


def prompts_file(path: Path, num: int = 10) -> Path:
    """Prompts of one to four words as JSONL."""
    rows = [" ".join(WORDS[4 + (i * 7 + j) % 20] for j in range(1 + i % 4)) for i in range(num)]
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return path


def ppo_config(root: Path, **changes: Any) -> PPOConfig:
    """A run of two small phases over the folders policy/, rm/ and prompts.jsonl of `root`."""
    sgd = OptimConfig("sgd", lr=0.05, schedule="linear", max_grad_norm=0.0)
    values: dict[str, Any] = {
        "output": str(root / "run"),
        "policy": ModelConfig(str(root / "policy")),
        "reward": RewardConfig(model=ModelConfig(str(root / "rm")), calibration_prompts=10),
        "critic": CriticConfig(optim=sgd),
        "data": DataConfig(
            str(root / "prompts.jsonl"), format="columns", columns={"prompt": "prompt"}
        ),
        "template": TemplateConfig("plain", SEPARATOR),
        "engine": EngineConfig("auto"),
        "sampling": SamplingConfig(max_new_tokens=8, temperature=0.8, batch_size=4),
        "optim": sgd,
        "total_steps": 2,
        "rollout_size": 8,
        "minibatch_size": 4,
        "ppo_epochs": 2,
        "microbatch_tokens": 30,
    }
    return PPOConfig(**{**values, **changes})
