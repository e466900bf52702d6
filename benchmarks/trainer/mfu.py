"""Model FLOPs utilisation of a PPO phase: arithmetic that the algorithm needs, over the peak.

    forward of T tokens in sequences of S, predicting R of them
            2 P T  +  2 H Q L T S  +  2 R V D
    phase   rollout      one forward of prompt + response, head at every response token
            reward       RM over prompt + response + response, head at the second
            experience   policy and reference with heads, critic without one
            update       epochs x (policy with head + critic) x 3, backward being two forwards
    MFU     sum of these / (seconds of the phase * peak)

P: weights of the layers without embeddings; H Q: width of the queries; L: layers; a token sees half
its sequence on average (a multiply-add is two operations, scores and values two products). What is
computed again (activation checkpointing, logits in backward) is not counted, so that it costs. The
definition is that of Chowdhery et al., PaLM, arXiv 2204.02311, appendix B. Windows are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second of the SXM parts, from NVIDIA's data sheets."""


def peak_of(device_name: str) -> float | None:
    """None for a device that is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


@dataclass(frozen=True)
class Size:
    """What a model's arithmetic follows from."""

    layers_weights: int
    query_width: int
    num_layers: int
    head_weights: int

    @classmethod
    def of(cls, lm: nn.Module, config: PretrainedConfig) -> Size:
        embeddings = {
            id(p) for m in lm.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
        }
        head = getattr(lm, "lm_head", None)
        heads = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
        trunk = sum(
            p.numel() for p in lm.parameters() if p.ndim > 1 and id(p) not in embeddings | heads
        )
        width = config.num_attention_heads * config.head_dim
        return cls(trunk, width, config.num_hidden_layers, config.vocab_size * config.hidden_size)

    def forward(self, tokens: float, length: float, predicted: float) -> float:
        attention = 2.0 * self.query_width * self.num_layers * tokens * length
        return 2.0 * self.layers_weights * tokens + attention + 2.0 * self.head_weights * predicted


def phase_flops(
    size: Size, count: int, prompt: float, response: float, epochs: int
) -> dict[str, float]:
    """Operations of a phase with so many responses, by the parts that its metrics time.

    reward_s holds reward and experience: they are timed as one.
    """
    length = prompt + response
    tokens, predicted = count * length, count * response
    once = size.forward(tokens, length, predicted)
    without_head = size.forward(tokens, length, 0)
    rm = size.forward(count * (length + response), length + response, predicted)
    return {
        "rollout": once,
        "reward": rm + 2 * once + without_head,
        "update": 3.0 * epochs * (once + without_head),
    }
