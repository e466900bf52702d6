"""Two-layer models of every causal architecture of transformers, from their configuration classes.

Sizes are set by the names that configurations use for them, and where a class needs more, in
SPECIAL. Windows and chunks are shorter than the sequences of the tests, and scaled and capped
logits are switched on, so that leaving them out shows.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from s2srm.models.attention import SDPA
from s2srm.models.load import disable_dropout, takes_attention_functions

VOCAB = 61
NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _all(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    **_all(32, "hidden_size d_model n_embd embedding_size dim emb_dim embed_dim lru_width"),
    **_all(2, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"),
    **_all(4, "num_attention_heads n_head n_heads num_heads attention_heads"),
    **_all(4, "decoder_attention_heads encoder_attention_heads"),
    **_all(2, "num_key_value_heads num_kv_heads n_head_kv"),
    **_all(8, "head_dim d_kv kv_channels attention_head_dim global_head_dim swa_head_dim"),
    **_all(48, "intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim"),
    **_all(48, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
    **_all(48, "moe_shared_expert_intermediate_size intermediate_size_mlp d_inner"),
    **_all(48, "dense_intermediate_size expert_ffn_hidden_size expert_intermediate_size"),
    **_all(48, "attention_hidden_size"),
    **_all(4, "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts"),
    **_all(2, "num_experts_per_tok moe_topk moe_top_k moe_k top_k_experts"),
    **_all(1, "n_group topk_group n_groups num_expert_groups n_shared_experts num_shared_experts"),
    **_all(16, "q_lora_rank kv_lora_rank qk_head_dim"),
    **_all(8, "qk_nope_head_dim qk_rope_head_dim v_head_dim rotary_dim"),
    "first_k_dense_replace": 1,
    **_all(8, "state_size mamba_d_state ssm_state_size"),
    **_all(4, "mamba_n_heads mamba_num_heads mamba_dt_rank time_step_rank"),
    **_all(16, "mamba_d_head mamba_head_dim mamba_headdim"),
    **_all(2, "mamba_expand n_mamba_heads"),
    **_all(1, "mamba_ngroups mamba_n_groups"),
    "mamba_d_ssm": 64,
    # Recurrences in chunks pad to whole ones.
    **_all(4, "mamba_chunk_size chunk_size"),
    **_all(2, "linear_num_key_heads linear_num_value_heads"),
    # With few heads, whose scores are cut at 0, many keys would tie, and a tie has no right answer.
    "index_n_heads": 16,
    **_all(8, "linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input"),
    "index_head_dim": 16,
    **_all(4, "sliding_window window_size attention_window_size attention_chunk_size index_topk"),
    **_all(4, "sliding_window_size keep_window_size"),
    "use_sliding_window": True,
    # One layer of each kind, where a period or a list of layers says which is which.
    **_all(2, "attn_layer_period expert_layer_period interleave_moe_layer_step"),
    **_all(1, "attn_layer_offset expert_layer_offset num_dense_layers"),
    "attn_layer_indices": [1],
    "mlp_only_layers": [0],
    **_all(128, "max_position_embeddings n_positions max_seq_len max_target_positions"),
    "pad_token_id": 0,
    **_all(1, "bos_token_id decoder_start_token_id"),
    "eos_token_id": 2,
    "is_decoder": True,
    "logits_scaling": 4.0,
    "logit_scale": 0.25,
    "lm_head_multiplier": 0.5,
    **_all(3.0, "final_logit_softcapping logits_soft_cap output_logit_soft_cap"),
}
_LOCAL = ["sliding_attention", "full_attention"]
_MLPS = ["dense", "sparse"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"mlp_layer_types": _MLPS},
    "cohere_compass_text": {"layer_types": _LOCAL, "rope_parameters": dict.fromkeys(_LOCAL, _ROPE)},
    "cpmant": {"dim_ff": 48, "dim_head": 8},
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32, "moe_top_k": 2},
    },
    "deepseek_v4": {
        **{"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 16, "num_hidden_layers": 3},
        "layer_types": [
            *("heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention")
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    "dots1": {"layer_types": _LOCAL},
    "dots3_note_text": {
        **{"num_key_value_heads": 4, "mlp_layer_types": _MLPS},
        "layer_types": ["indexed_attention", "sliding_attention"],
    },
    "gemma3n_text": {
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _LOCAL * 2},
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _LOCAL * 2},
        "enable_moe_block": True,
    },
    "gemma4_unified_text": {
        **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _LOCAL * 2},
    },
    "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hy_v4": {"indexer_types": ["full", "shared"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB},
    "inkling2_text": {
        **{"unpadded_vocab_size": VOCAB, "layer_types": ["hybrid_sliding", "hybrid"]},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2},
    },
    "inkling_text": {"mlp_layer_types": _MLPS},
    "kimi_linear": {
        **{"linear_head_dim": 8, "linear_num_heads": 2, "num_key_value_heads": 4},
        **{"num_expert_group": 1, "num_experts_per_token": 2},
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "laguna": {"layer_types": _LOCAL, "num_attention_heads_per_layer": [4, 4]},
    "lara_mini": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", *_LOCAL],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", *_LOCAL]},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": {"zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mellum": {"layer_types": _LOCAL, "mlp_layer_types": _MLPS},
    "minimax_m3_vl_text": {
        **{"layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": _MLPS},
        **{"index_n_heads": 2, "index_head_dim": 8, "index_block_size": 2, "index_topk_blocks": 2},
    },
    "ministral": {"layer_types": _LOCAL},
    "prophetnet": {
        **{"num_decoder_layers": 2, "num_decoder_attention_heads": 4},
        **{"num_encoder_layers": 2, "num_encoder_attention_heads": 4},
    },
    **_all({"layer_types": _LOCAL, "sliding_window": 4}, "qwen2 qwen2_moe qwen3"),
    "qwen4_exp_text": {
        **{"layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 16},
        **{"indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4},
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (16, 8),
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {"pronunciation_vocab_size": 11, "shape_vocab_size": 11},
    "smollm3": {"layer_types": _LOCAL, "no_rope_layers": [1, 0]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{"num_hidden_layers": 3, "num_key_value_heads": 4},
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        **{"attention_hidden_size": 64, "attention_head_dim": 16},
    },
    "zamba2": {
        **{"layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1]},
        **{"mamba_headdim": 8, "n_mamba_heads": 8, "adapter_rank": 4, "num_query_groups": 4},
        **{"num_key_value_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16},
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"]},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """The architecture's configuration at two layers of width 32."""
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    known = {*vars(default), *getattr(cls, "attribute_map", {})}
    values = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name in ("layer_types", "mlp_layer_types"):
        kinds = list(dict.fromkeys(getattr(default, name, None) or ()))
        if len(kinds) > 1 and name in vars(default):
            values[name] = kinds[:2]
    return cls(**(values | SPECIAL.get(model_type, {})))


def tiny_lm(config: PretrainedConfig) -> PreTrainedModel:
    """Random weights of visible size, with the attention and without the dropout of `load_lm`."""
    torch.manual_seed(0)
    disable_dropout(config)
    packs = takes_attention_functions(config, "")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=SDPA if packs else None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise.to(parameter.dtype))
    return model.eval()
