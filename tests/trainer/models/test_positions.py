"""Where each kind of configuration says how long a sequence may be."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    BloomConfig,
    DbrxConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    RobertaConfig,
    WhisperConfig,
    XGLMConfig,
)

from s2srm.models.positions import position_limit


class OtherConfig(PretrainedConfig):
    model_type = "of-a-hub-folder"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    "config, limit",
    [
        (LlamaConfig(max_position_embeddings=77), 77),
        (GPT2Config(n_positions=78), 78),
        (GPTJConfig(n_positions=79), 79),
        (DbrxConfig(max_seq_len=80), 80),
        (OPTConfig(max_position_embeddings=81), 81),
        (XGLMConfig(max_position_embeddings=82), 82),
        (WhisperConfig(max_target_positions=83), 83),
        (OtherConfig(max_sequence_length=84), 84),
        (OtherConfig(seq_length=85, n_positions=-1), 85),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (MptConfig(max_seq_len=86, attn_config={"alibi": False}), 86),
        (MptConfig(max_seq_len=86, attn_config={"alibi": True}), None),
        (FalconConfig(alibi=False, max_position_embeddings=87), 87),
        (FalconConfig(alibi=True, max_position_embeddings=87), None),
        (BloomConfig(), None),
        (MambaConfig(), None),
        (OtherConfig(), None),
        (Qwen2Config(max_position_embeddings=32768, rope_parameters=YARN), 131072),
        (Qwen2Config(max_position_embeddings=131072, rope_parameters=YARN), 131072),
        # Says nothing of what was stretched: some state the length before, some the one after.
        (LlamaConfig(max_position_embeddings=4096, rope_parameters=LINEAR), 4096),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "",
)
def test_position_limit(config: Any, limit: int | None) -> None:
    assert position_limit(config) == limit
