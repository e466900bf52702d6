"""Token rewards as the paper's figure tells them, with an RM that really generates.

Slow on purpose: the RM writes its correction with `generate`, the response is paid until it
diverges from it, and from there on the response is fed to the RM token by token, each time in a
forward of its own over the whole unpacked sequence (`generate` of one token is that and much more).
"""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PreTrainedModel

from s2srm.data.templates import Template
from s2srm.rollout.base import Response


def greedy(model: PreTrainedModel, tokens: list[int], max_new_tokens: int, eos: int) -> list[int]:
    """What the model writes after `tokens`."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos
    )
    ids = torch.tensor([tokens])
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(tokens) :].tolist()


def next_token(model: PreTrainedModel, tokens: list[int]) -> int:
    """The first token of what it writes after `tokens`."""
    with torch.no_grad():
        return int(model(torch.tensor([tokens])).logits[0, -1].argmax())


def naive_token_rewards(
    model: PreTrainedModel, template: Template, prompt: list[int], response: Response
) -> tuple[list[float], int, list[int]]:
    """(rewards, divergence index, correction): +1 until it diverges, -1 for diverging tokens."""
    given = template.rm_input(prompt, response.tokens)
    correction = greedy(model, given, len(response.tokens) + 4, template.eos_id)
    rewards: list[float] = []
    divergence = len(response.tokens)
    for t, token in enumerate(response.tokens):
        if divergence == len(response.tokens):
            if t < len(correction) and correction[t] == token:
                rewards.append(1.0)
                continue
            divergence = t
        fed = [*given, *response.tokens[:t]]
        agrees = next_token(model, fed) == token
        rewards.append(0.0 if agrees else -1.0)
    return rewards, divergence, correction
