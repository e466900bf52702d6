"""How many parameters an architecture has, and of which kinds, from the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters (elements, not bytes) and the sizes that formulas need.

    total         of the language model, tied ones once
    trunk         of its layers' matrices: what every token is multiplied with
    head          rows times columns of the LM head
    untied_head   the head's, where it is not the embedding itself, else 0
    largest       of the largest tensor
    layer         of one layer
    small         of tensors with fewer than 1e5 elements, which ZeRO-3 does not partition
    """

    total: int
    trunk: int
    head: int
    untied_head: int
    largest: int
    layer: int
    small: int
    layers: int
    hidden: int
    vocabulary: int
    query_width: int
    kv_width: int
    window: int | None

    def trained(self, value: bool) -> int:
        """Of a language model, or of a critic or scalar RM, whose own head stays as it was."""
        return self.total - self.untied_head + self.hidden + 1 if value else self.total

    def held(self, value: bool) -> int:
        """The same, with what is not trained."""
        return self.total + self.hidden + 1 if value else self.total


def count(config: PretrainedConfig) -> Counts:
    """Build the model on the meta device and count."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    head, embedding = lm.get_output_embeddings().weight, lm.get_input_embeddings().weight
    others = [p for p in lm.parameters() if p is not head and p is not embedding]
    stack = max((m for m in lm.modules() if isinstance(m, nn.ModuleList)), key=_size)
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Counts(
        total=sum(p.numel() for p in lm.parameters()),
        trunk=sum(p.numel() for p in others if p.dim() >= 2),
        head=head.numel(),
        untied_head=0 if head is embedding else head.numel(),
        largest=max(p.numel() for p in lm.parameters()),
        layer=max(_size(layer) for layer in stack),
        small=sum(p.numel() for p in lm.parameters() if p.numel() < 100_000),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=head.shape[0],
        query_width=heads * width,
        kv_width=(getattr(text, "num_key_value_heads", None) or heads) * width,
        window=getattr(text, "sliding_window", None),
    )


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
