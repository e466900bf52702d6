"""Two-layer models of every causal architecture of transformers, from their configuration classes.

Sizes are set by the names that configurations use for them. A class that cannot be built so is
listed in NOT_BUILDABLE with the reason, and the list is asserted by the tests.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from s2srm.config import EngineConfig, OptimConfig, SamplingConfig
from s2srm.engine import Engine, build_engine
from s2srm.errors import UserError
from s2srm.models.attention import SDPA
from s2srm.models.causal import PackedCausalLM
from s2srm.models.load import disable_dropout, takes_attention_functions, unsupported
from s2srm.models.trunk import own_attention, takes_packed, trunk_of
from s2srm.models.value import PackedValueModel
from s2srm.packing import Segment, pack
from s2srm.rollout.hf import HFRollout, named_tensors

SGD = OptimConfig(name="sgd", lr=0.1)
VOCAB = 61
WINDOW = 4
SIZES: dict[str, Any] = {
    **dict.fromkeys("vocab_size".split(), VOCAB),
    **dict.fromkeys(
        "hidden_size d_model n_embd embedding_size dim emb_dim embed_dim rotary_emb_base_dim".split(),
        32,
    ),
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers".split(), 2
    ),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads".split(),
        4,
    ),
    **dict.fromkeys("num_key_value_heads num_kv_heads n_head_kv".split(), 2),
    **dict.fromkeys(
        "head_dim d_kv kv_channels attention_head_dim global_head_dim swa_head_dim".split(), 8
    ),
    **dict.fromkeys(
        "intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim"
        " moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"
        " moe_shared_expert_intermediate_size intermediate_size_mlp dense_intermediate_size"
        " expert_ffn_hidden_size d_inner attention_hidden_size expert_intermediate_size".split(),
        48,
    ),
    **dict.fromkeys(
        "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts".split(),
        4,
    ),
    **dict.fromkeys("num_experts_per_tok moe_topk moe_top_k moe_k top_k_experts".split(), 2),
    **dict.fromkeys(
        "n_group topk_group n_groups num_expert_groups n_shared_experts num_shared_experts".split(),
        1,
    ),
    **dict.fromkeys("q_lora_rank kv_lora_rank".split(), 16),
    **dict.fromkeys("qk_nope_head_dim qk_rope_head_dim v_head_dim".split(), 8),
    "qk_head_dim": 16,
    "first_k_dense_replace": 1,
    **dict.fromkeys("state_size mamba_d_state ssm_state_size".split(), 8),
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "n_mamba_heads": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_headdim": 16,
    "mamba_ngroups": 1,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "time_step_rank": 4,
    "lru_width": 32,
    **dict.fromkeys("linear_num_key_heads linear_num_value_heads".split(), 2),
    **dict.fromkeys("linear_key_head_dim linear_value_head_dim".split(), 8),
    **dict.fromkeys(
        "sliding_window window_size attention_window_size attention_chunk_size sliding_window_size".split(),
        WINDOW,
    ),
    **dict.fromkeys(
        "max_position_embeddings n_positions max_seq_len max_target_positions".split(), 128
    ),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "is_decoder": True,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    "rotary_dim": 8,
    "logits_scaling": 4.0,
    "logit_scale": 0.25,
    "lm_head_multiplier": 0.5,
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0,
    "output_logit_soft_cap": 3.0,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            k: {"rope_type": "default", "rope_theta": 10000.0}
            for k in ("sliding_attention", "full_attention")
        },
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (16, 8), "hidden_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["hybrid", "hybrid"],
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "kv_channels": 8,
        "num_query_groups": 4,
        "hybrid_layer_ids": [1],
        "adapter_rank": 4,
    },
    "kimi_linear": {
        "linear_head_dim": 8,
        "linear_num_heads": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_expert_group": 1,
        "num_experts_per_token": 2,
        "num_key_value_heads": 4,
    },
    "inkling2_text": {
        "unpadded_vocab_size": VOCAB,
        "layer_types": ["hybrid_sliding", "hybrid"],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
    },
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB},
    "longcat_flash": {"zero_expert_num": 2, "moe_topk": 2},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32, "moe_top_k": 2},
    },
    "zaya": {"num_experts_per_tok": 1},
    "cpmant": {"dim_ff": 48, "dim_head": 8},
    "ctrl": {"dff": 48},
    "prophetnet": {
        "num_decoder_layers": 2,
        "num_encoder_layers": 2,
        "num_decoder_attention_heads": 4,
        "num_encoder_attention_heads": 4,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {"pronunciation_vocab_size": 11, "shape_vocab_size": 11},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 16,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
    },
}
NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PretrainedConfig:
    cls = CONFIG_MAPPING[model_type]
    known = {*vars(cls()), *getattr(cls, "attribute_map", {})}
    values = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:
        values["num_key_value_heads"] = values["num_attention_heads"]
    return cls(**(values | SPECIAL.get(model_type, {})))


def tiny_lm(config: PretrainedConfig) -> PreTrainedModel:
    """Random weights of visible size, as the trainer would load them."""
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


def verdict(model_type: str) -> str:
    """packed or one by one, everything equal to Hugging Face; or the line that refuses it."""
    config = tiny_config(model_type)
    fault = unsupported(config, trust_remote_code=False)
    if fault is not None:
        return f"refused: {fault}"
    lm = tiny_lm(config)
    own = copy.deepcopy(lm)
    own.set_attn_implementation(own_attention(own))
    critic = copy.deepcopy(lm)
    try:
        engine = build_engine(lambda zero: PackedCausalLM(lm, "x"), EngineConfig(), SGD)
        values = build_engine(
            lambda zero: PackedValueModel(critic, "normal", 0, "x"), EngineConfig(), SGD
        )
        check_losses(engine, own)
        check_values(values, own)
        check_rollouts(engine, own)
    except UserError as error:
        assert "\n" not in str(error) and model_type in str(error)
        return f"refused: {error}"
    manners = {takes_packed(lm), takes_packed(critic)}
    assert len(manners) == 1
    return "packed" if manners.pop() else "one by one"


def segments() -> list[Segment]:
    generator = torch.Generator().manual_seed(5)
    return [
        Segment(torch.randint(3, VOCAB, (length,), generator=generator).tolist(), start, weight)
        for length, start, weight in ((7, 3, 1.0), (15, 4, 0.5), (2, 1, 2.0), (10, 9, 1.5))
    ]


def own_logprobs(own: PreTrainedModel, segment: Segment) -> Tensor:
    """Of the predicted tokens, by the Hugging Face model alone."""
    ids = torch.tensor([list(segment.tokens)])
    logprobs = own(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    targets = ids[0, segment.start :]
    return logprobs[segment.start - 1 : -1].gather(1, targets[:, None])[:, 0]


def check_losses(engine: Engine, own: PreTrainedModel) -> None:
    """sft, rm: weighted cross entropy and its gradients. ppo: logprobs."""
    batch = pack(segments())
    pieces = [own_logprobs(own, segment) for segment in segments()]
    loss = -(torch.cat(pieces) * batch.weights).sum()
    loss.backward()
    found = engine.train_forward(batch, reduction="sum", row_weight=batch.weights)
    found.backward()
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        engine(batch, "logprobs").logprobs, torch.cat(pieces).detach(), rtol=1e-3, atol=1e-3
    )
    check_gradients(engine.module.lm, own)


def check_values(engine: Engine, own: PreTrainedModel) -> None:
    """scalar-rm and the critic: the score of every token, and its gradients."""
    batch = pack(segments())
    generator = torch.Generator().manual_seed(6)
    weights = torch.randn(batch.tokens.shape, generator=generator)
    module = engine.module
    assert isinstance(module, PackedValueModel)
    hidden = [
        trunk_of(own)(input_ids=torch.tensor([list(s.tokens)]), use_cache=False)[0][0]
        for s in segments()
    ]
    wanted = torch.nn.functional.linear(torch.cat(hidden), module.score.weight.detach())[:, 0]
    (wanted * weights).sum().backward()
    found = engine.train_forward(batch)
    (found * weights).sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    check_gradients(module.lm, own)


def check_gradients(ours: PreTrainedModel, own: PreTrainedModel) -> None:
    """Every parameter's, and cleared afterwards."""
    theirs = dict(own.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    for name, parameter in ours.named_parameters():
        grad, found = theirs[name].grad, parameter.grad
        if grad is None or found is None:
            assert all(g is None or not g.any() for g in (grad, found)), name
            continue
        bound = 1e-3 * float(grad.abs().max()) + 1e-5 * largest
        assert (found - grad).abs().max() <= bound, name
    own.zero_grad()
    ours.zero_grad()


@torch.no_grad()
def check_rollouts(engine: Engine, own: PreTrainedModel) -> None:
    """Greedy responses to unequal prompts in one call, and the logprobs that ppo gives them."""
    prompts = [list(s.tokens) for s in segments()[:3]]
    generator = HFRollout.without_weights(engine.module.lm)
    generator.update_weights(named_tensors(engine.module.lm))
    sampling = SamplingConfig(max_new_tokens=5, temperature=0.0)
    responses = generator.generate(prompts, [0, 1, 2], sampling, 2, suppress=[2])
    for prompt, response in zip(prompts, responses, strict=True):
        tokens = list(prompt)
        for token in response.tokens:
            logits = own(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            logits[2] = -torch.inf
            assert logits[token] >= logits.max() - 1e-4
            tokens.append(token)
        segment = Segment(tokens, len(prompt))
        found = engine(pack([segment, *segments()]), "logprobs").logprobs[:5]
        torch.testing.assert_close(found, own_logprobs(own, segment), rtol=1e-3, atol=1e-3)
