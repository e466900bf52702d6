"""Models of a few thousand parameters with random weights, one per architecture family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.bloom import BloomConfig
from transformers.models.cohere import CohereConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.granite import GraniteConfig
from transformers.models.llama import LlamaConfig
from transformers.models.opt import OPTConfig
from transformers.models.phi import PhiConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

VOCAB = 61
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GEMMA: dict[str, Any] = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
GEMMA3: dict[str, Any] = {
    **GEMMA,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}


def tiny_config(name: str, **changes: Any) -> PretrainedConfig:
    """Configuration of the family `name`; a "-tied" at the end ties head and embedding."""
    family, _, tied = name.partition("-")
    values = {**BASE, "tie_word_embeddings": tied == "tied", **changes}
    match family:
        case "llama":
            return LlamaConfig(**values)
        case "gemma2":
            caps = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
            return Gemma2Config(**{**values, **GEMMA, **caps})
        case "gemma3":
            return Gemma3TextConfig(**{**values, **GEMMA3})
        case "qwen2":
            return Qwen2Config(**values)
        case "qwen3":
            return Qwen3Config(**values, head_dim=8)
        case "granite":
            return GraniteConfig(**values, logits_scaling=4.0)
        case "cohere":
            return CohereConfig(**values, logit_scale=0.25)
        case "phi":
            return PhiConfig(**values)
        case "bloom":
            ids = {name: values[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
            return BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, **ids)
        case "opt":
            # Norms after the layers, as OPT-350m has them.
            return OPTConfig(**values, ffn_dim=48, do_layer_norm_before=False)
    raise ValueError(name)


def tiny_model(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """Random weights large enough for logprobs to differ visibly, the same in every process."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.2 * noise)
    return model.to(dtype).eval()


def save_tiny(name: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A model folder without a tokenizer."""
    tiny_model(name, seed=seed, **changes).save_pretrained(folder)
    return folder
