"""Hidden states of a packed batch, by one of two ways that give the same.

packed      one forward over all sequences end to end. It needs an architecture that calls the
            attention functions of attention.py, keeps to the positions it is given, and carries
            nothing else from token to token.
one by one  each sequence by itself with the model's own attention, for every other architecture:
            state-space models, ALiBi, attention classes from before transformers' interface. As
            right as the model is, and slower.

Which one a model takes is a property of its `config._attn_implementation`. The check at load
(check.py) changes it from the first to the second where the first gives something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from s2srm import distributed
from s2srm.models.attention import MEANINGS
from s2srm.packing import Packed


def takes_packed(lm: PreTrainedModel) -> bool:
    """Whether the model's attention functions cut a packed batch at its sequences."""
    return str(lm.config._attn_implementation) in MEANINGS


def own_attention(lm: PreTrainedModel) -> str:
    """The plain attention that transformers itself takes for the model: sdpa, else eager."""
    if softcaps_attention(lm.config):
        return "eager"
    return lm.get_correct_attn_implementation(None)


def softcaps_attention(config: PretrainedConfig) -> bool:
    """Whether attention scores are softcapped (Gemma 2), which transformers' sdpa leaves out."""
    return getattr(config, "attn_logit_softcapping", None) is not None


@contextmanager
def with_own_attention(lm: PreTrainedModel) -> Iterator[None]:
    """Inside, the model runs as Hugging Face's own, for unpacked sequences."""
    before = str(lm.config._attn_implementation)
    if not takes_packed(lm):
        yield
        return
    lm.set_attn_implementation(own_attention(lm))
    try:
        yield
    finally:
        lm.set_attn_implementation(before)


def trunk_forward(lm: PreTrainedModel, batch: Packed) -> Tensor:
    """(T, D) last hidden states of the decoder stack over a packed batch."""
    if takes_packed(lm):
        return trunk_of(lm)(**_packed_inputs(batch)).last_hidden_state[0]
    # Agreed on first: once a rank is in a forward, the others must be in one too.
    missing = _missing_forwards(lm, batch)
    found = torch.cat([own_hidden(lm, tokens) for tokens in batch.tokens.split(_lengths(batch))])
    for _ in range(missing):
        found = found + 0.0 * own_hidden(lm, batch.tokens[:1]).sum()
    return found


def trunk_of(lm: PreTrainedModel) -> nn.Module:
    """The decoder stack below the head; some models (Llama 4's) misname it to transformers."""
    return lm.base_model if lm.base_model is not lm else lm.get_submodule("model")


def own_hidden(lm: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(T, D) last hidden states of one sequence, as the model itself gives them."""
    return trunk_of(lm)(input_ids=tokens[None], use_cache=False).last_hidden_state[0]


def _missing_forwards(lm: PreTrainedModel, batch: Packed) -> int:
    """How many forwards this rank has fewer than the one with most sequences.

    ZeRO-3 gathers weights forward by forward, in which all ranks must keep step.
    """
    if not any(hasattr(p, "ds_id") for p in lm.parameters()):
        return 0
    return distributed.max_over_ranks(batch.num_sequences) - batch.num_sequences


def _lengths(batch: Packed) -> tuple[int, ...]:
    return tuple(batch.cu_seqlens.diff().tolist())


def _packed_inputs(batch: Packed) -> dict[str, Any]:
    """A batch of one row for transformers, with what the attention functions need beside it."""
    lengths = _lengths(batch)
    return {
        "input_ids": batch.tokens[None],
        "position_ids": batch.positions[None],
        "use_cache": False,
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "sequence_lengths": lengths,
    }
