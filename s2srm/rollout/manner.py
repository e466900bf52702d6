"""How a model may be generated from: whether prompts may be padded, whether the cache is right.

Tried once on two short prompts of unequal length, against the model's own forward without padding
and cache: recurrent states see padding, some position embeddings count it, some architectures'
caches leave something out, and some cannot drop the rows of responses that have ended. The fast way
is taken where it gives the same, else a slower one, which is said in the log. Rollouts are then of
the policy that is trained.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from s2srm import distributed
from s2srm.errors import UserError
from s2srm.models.check import unit

logger = logging.getLogger(__name__)

CACHE = "cache" if hasattr(GenerateDecoderOnlyOutput, "cache") else "past_key_values"
"""What transformers' `generate` takes and gives back the cache as; it was renamed."""
_STEPS = 3
_LENGTHS = (9, 4)


class Manner(NamedTuple):
    """pads: prompts of unequal length may share a forward. caches: keys and values may be kept.
    drops: rows of the cache may be dropped while the others go on."""

    pads: bool
    caches: bool
    drops: bool


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
    manners = (
        Manner(True, True, True),
        Manner(True, True, False),
        Manner(False, True, False),
        Manner(False, False, False),
    )
    for manner in manners:
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
        width = max(len(prompt) for prompt in group)
        tokens = torch.zeros(len(group), width, dtype=torch.int64, device=group[0].device)
        mask = torch.zeros_like(tokens)
        for i, prompt in enumerate(group):
            tokens[i, width - len(prompt) :] = prompt
            mask[i, width - len(prompt) :] = 1
        out = _generate(model, tokens, mask, manner.caches)
        worst = max(worst, *(_apart(model, p, out, i, width) for i, p in enumerate(group)))
        if manner.drops:
            kept = torch.tensor([len(group) - 1], device=tokens.device)
            cached = out[CACHE]
            cached.batch_select_indices(kept)
            mask = F.pad(mask[kept], (0, _STEPS), value=1)
            out = _generate(model, out.sequences[kept], mask, manner.caches, cached)
            worst = max(worst, _apart(model, group[-1], out, 0, width))
    return worst


def _apart(model: PreTrainedModel, prompt: Tensor, out: Any, row: int, width: int) -> float:
    """The same of one row, whose response begins in column `width`."""
    whole = torch.cat([prompt, out.sequences[row, width:-1]])
    own = model(input_ids=whole[None], use_cache=False).logits[0, -len(out.logits) :]
    wanted = own.float().log_softmax(-1)
    found = torch.stack([logits[row] for logits in out.logits]).float().log_softmax(-1)
    apart = (wanted - found).abs().max() / unit(wanted)
    return float(apart.detach().nan_to_num(torch.inf))


def _generate(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, caches: bool, cached: Any = None
) -> Any:
    """_STEPS more tokens, greedily: sequences, logits of every step, cache."""
    config = GenerationConfig(
        max_new_tokens=_STEPS, do_sample=False, use_cache=caches, pad_token_id=0
    )
    config.update(output_logits=True, return_dict_in_generate=True)
    return cast(Any, model).generate(
        tokens,
        attention_mask=mask,
        generation_config=config,
        synced_gpus=False,
        **{CACHE: cached},
    )


@cache
def _log(kind: str, manner: Manner) -> None:
    if manner.drops or not distributed.is_main():
        return
    if manner.pads:
        logger.warning(
            "%s models generate on for responses that have ended: their cache keeps all rows", kind
        )
        return
    text = "" if manner.caches else ", and without a cache"
    logger.warning(
        "%s models generate for prompts of one length at a time%s: padding changes what they write",
        kind,
        text,
    )
