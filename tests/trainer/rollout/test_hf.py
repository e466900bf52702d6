"""Rollouts by transformers' generate: what is sampled, where it ends, and what cannot slip in."""

import math
from collections import Counter

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from s2srm.config import SamplingConfig
from s2srm.rollout.base import sampling_seed
from s2srm.rollout.hf import HFRollout, named_tensors

VOCAB, EOS = 23, 2


def llama(scale: float = 1.0, tie: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def gemma() -> Gemma3ForCausalLM:
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=128,
        pad_token_id=0,
    )
    return Gemma3ForCausalLM(config).eval()


PROMPTS = [[5], [5, 6, 7, 8, 9, 10, 11], [4, 4, 4], [7, 8], [EOS, 5, EOS, 6]]


@pytest.mark.parametrize("make", [lambda: llama(20.0), gemma], ids=["llama", "gemma3_sliding"])
def test_response_does_not_depend_on_the_batch(make):
    engine = HFRollout(make())
    seeds = [sampling_seed(3, 0, i) for i in range(len(PROMPTS))]
    cfg = SamplingConfig(max_new_tokens=24, temperature=0.9, batch_size=len(PROMPTS))
    together = engine.generate(PROMPTS, seeds, cfg, EOS)
    pairs = engine.generate(PROMPTS, seeds, SamplingConfig(24, 0.9, 2), EOS)
    alone = [engine.generate([p], [s], cfg, EOS)[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    backwards = engine.generate(PROMPTS[::-1], seeds[::-1], cfg, EOS)[::-1]
    assert together == pairs == alone == backwards
    assert len({len(r.tokens) for r in together}) > 1, "lengths must differ for this to mean much"


def test_another_seed_is_another_response():
    engine = HFRollout(llama())
    cfg = SamplingConfig(max_new_tokens=12)
    a, b, c = engine.generate([[5, 6]] * 3, [1, 2, 1], cfg, EOS)
    assert a == c != b


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_sampled_distribution_is_softmax_of_logits_over_temperature(temperature):
    model = llama(10.0)
    count = 6000
    cfg = SamplingConfig(max_new_tokens=1, temperature=temperature, batch_size=count)
    seeds = [sampling_seed(0, 0, i) for i in range(count)]
    drawn = HFRollout(model).generate([[5, 6, 7]] * count, seeds, cfg, EOS)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    expected = (logits / temperature).softmax(-1) * count
    assert expected.min() > 5
    counts = Counter(r.tokens[0] for r in drawn)
    observed = torch.tensor([counts[v] for v in range(VOCAB)], dtype=torch.float)
    chi_squared = float(((observed - expected) ** 2 / expected).sum())
    # 22 degrees of freedom: mean 22, standard deviation 6.6; 60 is beyond p = 1e-5.
    assert chi_squared < 60
    wrong = (logits / (temperature * 1.5)).softmax(-1) * count
    assert float(((observed - wrong) ** 2 / wrong).sum()) > 60, "the test could not tell 1.5 T"


def test_temperature_zero_is_greedy():
    model = llama(20.0)
    cfg = SamplingConfig(max_new_tokens=8, temperature=0.0)
    response = HFRollout(model).generate([[5, 6]], [9], cfg, EOS)[0]
    tokens = [5, 6]
    for token in response.tokens:
        with torch.no_grad():
            assert token == int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(token)


def test_the_models_generation_config_does_not_slip_in():
    cfg = SamplingConfig(max_new_tokens=16)
    clean = HFRollout(llama()).generate([[5, 6]] * 4, [1, 2, 3, 4], cfg, EOS)
    model = llama()
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(10, VOCAB)),
        min_new_tokens=10,
        max_new_tokens=3,
        forced_eos_token_id=7,
        eos_token_id=[EOS, 3, 4, 5],
    )
    own = model.generation_config
    assert HFRollout(model).generate([[5, 6]] * 4, [1, 2, 3, 4], cfg, EOS) == clean
    assert model.generation_config is own


def test_ends_at_the_first_eos_and_only_there():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform: EOS comes with probability 1/23 a token
    cfg = SamplingConfig(max_new_tokens=30, batch_size=64)
    responses = HFRollout(model).generate([[5]] * 64, list(range(64)), cfg, EOS)
    finished = [r for r in responses if r.finished]
    truncated = [r for r in responses if not r.finished]
    assert finished and truncated
    assert all(r.tokens.index(EOS) == len(r.tokens) - 1 for r in finished)
    assert all(EOS not in r.tokens and len(r.tokens) == 30 for r in truncated)
    assert len({len(r.tokens) for r in finished}) > 5
    mean = sum(len(r.tokens) for r in responses) / 64
    assert math.isclose(mean, (1 - (22 / 23) ** 30) * 23, rel_tol=0.25)


def test_other_end_tokens_of_the_model_do_not_end_a_response():
    model = llama()
    model.config.eos_token_id = [EOS, 3]
    with torch.no_grad():
        model.lm_head.weight.zero_()
    cfg = SamplingConfig(max_new_tokens=40, batch_size=32)
    responses = HFRollout(model).generate([[5]] * 32, list(range(32)), cfg, EOS)
    assert any(3 in r.tokens[:-1] for r in responses)
    assert all(r.tokens[-1] == EOS for r in responses if r.finished)


def test_eos_inside_the_prompt_and_as_padding_changes_nothing():
    # pad == EOS in the engine: prompts with EOS at either end must keep their own tokens.
    engine = HFRollout(llama(20.0))
    cfg = SamplingConfig(max_new_tokens=10)
    prompts = [[EOS, EOS, 5], [5], [5, EOS], [6] * 9]
    together = engine.generate(prompts, [1, 2, 3, 4], cfg, EOS)
    alone = [engine.generate([p], [i + 1], cfg, EOS)[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert together[0] != engine.generate([[5]], [1], cfg, EOS)[0]


def test_suppressed_ids_never_come():
    model = llama()
    cfg = SamplingConfig(max_new_tokens=30, batch_size=32)
    banned = [EOS, 5, 6, 7]
    responses = HFRollout(model).generate([[5]] * 32, list(range(32)), cfg, EOS, suppress=banned)
    seen = {t for r in responses for t in r.tokens}
    assert not seen & set(banned) and len(seen) > 10
    assert not any(r.finished for r in responses)


def test_bad_calls_name_what_is_wrong():
    engine = HFRollout(llama())
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        engine.generate([[5], []], [1, 2], SamplingConfig(4), EOS)
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        engine.generate([[5], [6]], [1], SamplingConfig(4), EOS)
    with pytest.raises(ValueError, match="temperature"):
        engine.generate([[5]], [1], SamplingConfig(4, -1.0), EOS)
    assert engine.generate([], [], SamplingConfig(4), EOS) == []


@pytest.mark.parametrize(
    "make", [llama, lambda: llama(tie=True), gemma], ids=["untied", "tied", "gemma3"]
)
def test_weights_are_taken_over_without_copying_and_dropped(make):
    model = make()
    cfg = SamplingConfig(max_new_tokens=6, temperature=0.7)
    expected = HFRollout(model).generate(PROMPTS, [1, 2, 3, 4, 5], cfg, EOS)
    engine = HFRollout.without_weights(model)
    assert all(p.is_meta for p in engine.model.parameters())
    engine.update_weights(named_tensors(model))
    held = dict(engine.model.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert held[name].data_ptr() == parameter.data_ptr()
        assert not held[name].requires_grad
    assert engine.generate(PROMPTS, [1, 2, 3, 4, 5], cfg, EOS) == expected
    engine.drop_weights()
    assert all(p.is_meta for p in engine.model.parameters())
    engine.update_weights(named_tensors(model))
    assert engine.generate(PROMPTS, [1, 2, 3, 4, 5], cfg, EOS) == expected


def test_wrong_weights_are_named():
    model = llama()
    engine = HFRollout.without_weights(model)
    tensors = dict(named_tensors(model))
    missing = {k: v for k, v in tensors.items() if k != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        engine.update_weights(missing.items())
    with pytest.raises(ValueError, match=r"unknown to the model: \['extra'\]"):
        engine.update_weights({**tensors, "extra": torch.zeros(1)}.items())
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(3, 16\)"):
        engine.update_weights({**tensors, "lm_head.weight": torch.zeros(3, 16)}.items())


def test_rows_that_have_ended_leave_the_batch(monkeypatch):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform: EOS comes with probability 1/23 a token
    cfg = SamplingConfig(max_new_tokens=30, batch_size=16)
    engine = HFRollout(model)
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    prompts = [[5] * (1 + i % 3) for i in range(16)]
    responses = engine.generate(prompts, list(range(16)), cfg, EOS)
    hook.remove()
    steps = sizes[-max(len(r.tokens) for r in responses) :]
    assert steps[0] == 16 and steps[-1] <= 12 and steps == sorted(steps, reverse=True)
    monkeypatch.setattr("s2srm.rollout.hf.KEEP", -1.0)
    assert engine.generate(prompts, list(range(16)), cfg, EOS) == responses


def test_sampling_seeds_are_distinct_and_stable():
    seeds = {sampling_seed(s, p, i) for s in range(3) for p in range(-1, 5) for i in range(50)}
    assert len(seeds) == 3 * 6 * 50
    assert all(0 <= s < 2**63 for s in seeds)
    assert sampling_seed(1, 23, 4) != sampling_seed(12, 3, 4)
    assert sampling_seed(0, 0, 0) == 4808561972376111626
