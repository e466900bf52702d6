"""How a model may be generated from: whether prompts may be padded, whether the cache is right.

Tried once on two short prompts of unequal length, against the model's own forward without padding
and cache: recurrent states see padding, some position embeddings count it, and some architectures'
caches leave something out. The fast way is taken where it gives the same, else a slower one, which
is said in the log. Rollouts are then of the policy that is trained.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from s2srm import distributed
from s2srm.errors import UserError
from s2srm.models.check import unit

logger = logging.getLogger(__name__)

_STEPS = 3
_LENGTHS = (9, 4)


class Manner(NamedTuple):
    """pads: prompts of unequal length may share a forward. caches: keys and values may be kept."""

    pads: bool
    caches: bool


def find_manner(model: PreTrainedModel) -> Manner:
    """The fastest manner that gives the model's own logits; UserError if none does.

    model has its weights, is in evaluation mode, and has an empty generation_config. No rank
    waits for another here.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(2)
    vocabulary = int(model.config.get_text_config().vocab_size)
    prompts = [torch.randint(vocabulary, (n,), generator=generator).to(device) for n in _LENGTHS]
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    kind, reason = model.config.model_type, ""
    for manner in (Manner(True, True), Manner(False, True), Manner(False, False)):
        try:
            difference = _difference(model, prompts, manner)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if difference <= (1e-3 if exact else 0.25):
            _log(kind, manner)
            return manner
        reason = f"its logits differ from those of a plain forward by {difference:.2g}"
    raise UserError(f"{kind} models cannot be generated from: {reason}; take another architecture")


def _difference(model: PreTrainedModel, prompts: list[Tensor], manner: Manner) -> float:
    """Largest difference of logprobs over the steps of a greedy generation, in their `unit`."""
    worst = 0.0
    for group in [prompts] if manner.pads else [[prompt] for prompt in prompts]:
        tokens, logits = _generate(model, group, manner.caches)
        width = tokens.shape[1] - _STEPS
        for i, prompt in enumerate(group):
            whole = torch.cat([prompt, tokens[i, width:-1]])
            own = model(input_ids=whole[None], use_cache=False).logits[0, -_STEPS:]
            wanted = own.float().log_softmax(-1)
            apart = (wanted - logits[i].float().log_softmax(-1)).abs().max() / unit(wanted)
            worst = max(worst, float(apart.detach().nan_to_num(torch.inf)))
    return worst


def _generate(model: PreTrainedModel, prompts: list[Tensor], caches: bool) -> tuple[Tensor, Tensor]:
    """(tokens (B, width + _STEPS), logits (B, _STEPS, V)) of greedy generation, padded left."""
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), width, dtype=torch.int64, device=prompts[0].device)
    mask = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
        tokens[i, width - len(prompt) :] = prompt
        mask[i, width - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=_STEPS, do_sample=False, use_cache=caches, pad_token_id=0
    )
    config.update(output_logits=True, return_dict_in_generate=True)
    out = cast(Any, model).generate(
        tokens, attention_mask=mask, generation_config=config, synced_gpus=False
    )
    return out.sequences, torch.stack(out.logits, dim=1)


@cache
def _log(kind: str, manner: Manner) -> None:
    if manner.pads or not distributed.is_main():
        return
    text = "" if manner.caches else ", and without a cache"
    logger.warning(
        "%s models generate for prompts of one length at a time%s: padding changes what they write",
        kind,
        text,
    )
