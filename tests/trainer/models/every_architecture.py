"""Every causal architecture of transformers equals Hugging Face's own, or is refused in one line.

`verdict` holds one to its losses, logprobs, values, rollouts and the gradients of every parameter.
The test_architectures files share the names between them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_architectures import NAMES, VOCAB, tiny_config, tiny_lm
from torch import Tensor
from transformers import PreTrainedModel

from s2srm.config import EngineConfig, OptimConfig, SamplingConfig
from s2srm.engine import Engine, build_engine
from s2srm.errors import UserError
from s2srm.models.causal import PackedCausalLM
from s2srm.models.load import unsupported
from s2srm.models.trunk import own_attention, takes_packed, trunk_of
from s2srm.models.value import PackedValueModel
from s2srm.packing import Segment, pack
from s2srm.rollout.hf import HFRollout, named_tensors

MULTI_MODAL = "multi-modal"
ENCODER_DECODER = "encoder-decoder"
HEAD = "its logprobs or hidden states are not those of its own forward"
NOT_CAUSAL = "it is not causal"
REFUSED = {
    MULTI_MODAL: """blt dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified
        gemma4_unified_assistant git got_ocr2 llama4 mllama moss_transcribe_diarize phi4_multimodal
        qwen3_5 qwen3_5_moe qwen4_exp""",
    ENCODER_DECODER: """bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen
        musicgen_melody mvp pegasus plbart prophetnet whisper""",
    # Between hidden states and vocabulary they have more than one matrix.
    HEAD: """bert big_bird camembert data2vec-text electra ernie megatron-bert modernbert-decoder
        rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod""",
    "the LM head is a": "dory",
    NOT_CAUSAL: "cpmant xlm xlnet",
    "it raises AssertionError": "reformer",
}
# Recurrent states, sparse attention (top keys of a whole row), attention sinks, ALiBi, chunks,
# windows that attention is not told of, and attention classes without the interface.
ONE_BY_ONE = """
    axk2 bailing_hybrid bamba bloom deepseek_v32 deepseek_v4 doge dots3_note_text falcon
    falcon_h1 falcon_mamba flint glm_moe_dsa gpt_neo gpt_neox_japanese gpt_oss granite_swa
    granitemoe_swa granitemoehybrid hy_v4 inkling2_loop_text inkling2_text inkling_text jamba
    kimi_linear lara_mini lfm2 lfm2_moe lfm3 llama4_text mamba mamba2 mimo_v2_flash minimax
    minimax_m3_vl_text mpt nemotron nemotron_h olmo_hybrid openai-gpt phimoe qwen2_moe
    qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text recurrent_gemma rwkv stablelm trocr
    xglm xlstm zamba zamba2 zaya
"""
# Its own default configuration is refused by its own class.
NOT_BUILDABLE = {"gemma4_assistant": "hidden_size_per_layer_input must be 0"}
SGD = OptimConfig(name="sgd", lr=0.1)
EOS = 2


def share(part: int, parts: int = 4) -> list[str]:
    """The names that one test file takes."""
    return NAMES[part::parts]


def check(model_type: str) -> None:
    """AssertionError unless the architecture does what the tables above say of it."""
    if model_type in NOT_BUILDABLE:
        with pytest.raises(Exception, match=NOT_BUILDABLE[model_type]):
            tiny_config(model_type)
        return
    reasons = [reason for reason, names in REFUSED.items() if model_type in names.split()]
    found = verdict(model_type)
    if reasons:
        assert found.startswith("refused: ") and reasons[0] in found, found
    else:
        wanted = "one by one" if model_type in ONE_BY_ONE.split() else "packed"
        assert found == wanted, found


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
    responses = generator.generate(prompts, [0, 1, 2], sampling, EOS, [EOS])
    for prompt, response in zip(prompts, responses, strict=True):
        tokens = [*prompt, *response.tokens]
        # One forward says what each token was chosen from: the model is causal, or was refused.
        logits = own(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        logits[:, EOS] = -torch.inf
        rows = logits[len(prompt) - 1 : -1]
        chosen = rows.gather(1, torch.tensor(response.tokens)[:, None])[:, 0]
        assert len(response.tokens) == 5 and (chosen >= rows.amax(1) - 1e-4).all()
        segment = Segment(tokens, len(prompt))
        found = engine(pack([segment, *segments()]), "logprobs").logprobs[:5]
        torch.testing.assert_close(found, own_logprobs(own, segment), rtol=1e-3, atol=1e-3)
