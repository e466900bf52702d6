"""How many positions a model has: the one place that knows what configurations call that number.

A model with learned positions fails beyond it, one with rotary positions goes on and writes
nonsense, so the stages hold both to it. Left out: windows and chunks of attention, which bound what
a token sees and not how long a sequence may be.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

_NAMES = (
    "max_position_embeddings",  # nearly all; gpt2, gptj, dbrx and others map their own name to it
    "n_positions",
    "max_seq_len",  # mpt
    "max_sequence_length",
    "seq_length",
    "max_target_positions",
)
# Their positions are learned and start at padding_idx + 1.
_OFFSET_BY_PADDING = frozenset(
    [
        "camembert",
        "data2vec-text",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    ]
)
_UNBOUNDED = frozenset({"bloom", "falcon_mamba", "mamba", "mamba2", "rwkv", "xlnet", "xlstm"})


def position_limit(config: PretrainedConfig) -> int | None:
    """Most tokens that a sequence may have, response included; None where there is no limit.

    None: ALiBi, recurrent models, and configurations that state no number. Rotary positions that
    were stretched (YaRN and others that say what they were stretched from) count as stretched.
    """
    if config.model_type in _UNBOUNDED or _has_alibi(config):
        return None
    for name in _NAMES:
        stated = getattr(config, name, None)
        if isinstance(stated, int) and stated > 0:
            break
    else:
        return None
    if config.model_type in _OFFSET_BY_PADDING:
        return stated - (getattr(config, "pad_token_id", None) or 0) - 1
    return max(stated, _stretched(config))


def _has_alibi(config: PretrainedConfig) -> bool:
    """Falcon and BLOOM say it at the top, MPT beside its other settings of attention."""
    nested: Any = getattr(config, "attn_config", None)
    inside = nested.get("alibi") if isinstance(nested, dict) else getattr(nested, "alibi", None)
    return (
        bool(getattr(config, "alibi", False) or inside)
        or getattr(config, "position_embedding_type", None) == "alibi"
    )


def _stretched(config: PretrainedConfig) -> int:
    """original_max_position_embeddings * factor of RoPE settings that name both, else 0."""
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict):
        return 0
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if not isinstance(original, int) or not isinstance(factor, int | float):
        return 0
    return int(original * factor)
