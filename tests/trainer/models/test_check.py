"""The check at load: wrong attention, heads and gradients are found, whatever hides them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

from s2srm.models import attention as attention_module
from s2srm.models.attention import SDPA
from s2srm.models.causal import PackedCausalLM
from s2srm.models.check import FAULTS, check_batch, fault_of
from s2srm.models.value import PackedValueModel
from s2srm.rollout.manner import find_manner

CAUSAL, FORWARD, GRADIENT, WINDOWS = FAULTS
MODELS = [PackedCausalLM, PackedValueModel]


def packed(name: str, **changes: Any) -> PreTrainedModel:
    lm = tiny_model(name, **changes)
    lm.set_attn_implementation(SDPA)
    return lm


def fault(model: PackedCausalLM | PackedValueModel) -> str | None:
    return fault_of(model(check_batch(model.lm), "check").tolist(), torch.float32)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("name", ["llama", "gemma2-tied", "gemma3", "granite", "cohere-tied"])
def test_right_models_pass(name: str, make: Callable[[PreTrainedModel], Any]) -> None:
    assert fault(make(packed(name))) is None
    frozen = make(packed(name)).requires_grad_(False)
    with torch.no_grad():
        assert fault(frozen) is None


def test_sequences_are_unequal_and_the_first_is_not_the_longest() -> None:
    batch = check_batch(packed("llama"))
    lengths = batch.cu_seqlens.diff().tolist()
    assert len(set(lengths)) == len(lengths) >= 3
    assert min(lengths) > 2 and lengths[0] != max(lengths)
    assert len(set(batch.tokens.tolist())) > 15
    short = check_batch(packed("llama", max_position_embeddings=8))
    assert int(short.cu_seqlens.diff().max()) == 8


def without(lm: PreTrainedModel, *names: str) -> None:
    """Let the attention of the first layer forget some of what it is given."""
    attention: Any = lm.model.layers[0].self_attn
    forward = attention.forward

    def deaf(*args: object, **kwargs: object) -> object:
        for name in names:
            kwargs.pop(name, None)
        return forward(*args, **kwargs)

    attention.forward = deaf


@pytest.mark.parametrize("make", MODELS)
def test_attention_across_sequences_is_found(make: Callable[[PreTrainedModel], Any]) -> None:
    lm = packed("llama")
    without(lm, "cu_seq_lens_q", "sequence_lengths")
    found = fault(make(lm))
    assert found is not None and found.startswith(FORWARD)


@pytest.mark.parametrize("make", MODELS)
def test_attention_to_the_future_is_found(
    make: Callable[[PreTrainedModel], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As BLOOM's, which builds its causal mask outside its attention."""

    def everything(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        return nn.functional.scaled_dot_product_attention(query, key, value)

    model = make(packed("llama"))
    monkeypatch.setattr(attention_module, "_attend", everything)
    found = fault(model)
    assert found is not None and found.startswith(FORWARD)


def test_a_model_that_sees_the_future_by_itself_is_found() -> None:
    lm = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4))
    assert fault(PackedCausalLM(lm)) is None
    lm.transformer.build_alibi_tensor = lambda *args: torch.randn(1, 4, 1).expand(4, 1, 19)
    lm.transformer.h[0].self_attention.forward = lambda x, residual, **_: (
        residual + x.mean(1, keepdim=True),
        None,
    )
    found = fault(PackedValueModel(lm))
    assert found is not None and found.startswith(CAUSAL)


def test_another_head_is_found() -> None:
    model = PackedCausalLM(packed("granite"))
    model.head.scale = 1.0
    found = fault(model)
    assert found is not None and found.startswith(FORWARD)


@pytest.mark.parametrize("make", MODELS)
def test_another_gradient_is_found(make: Callable[[PreTrainedModel], Any]) -> None:
    """The forward is right, and packed batches do not train the first layer's attention."""
    lm = packed("llama")
    attention: Any = lm.model.layers[0].self_attn
    forward = attention.forward

    def detached(*args: Any, **kwargs: Any) -> Any:
        out, weights = forward(*args, **kwargs)
        return (out.detach() if "cu_seq_lens_q" in kwargs else out), weights

    attention.forward = detached
    found = fault(make(lm))
    assert found is not None and found.startswith(GRADIENT)


def test_a_window_that_attention_is_not_told_of_is_found() -> None:
    """The window is longer than the check's sequences, so that no logit shows it."""
    lm: Any = packed("gemma3")
    lm.config.sliding_window = 4096
    for layer in lm.model.layers[:2]:
        layer.self_attn.sliding_window = 4096
    assert fault(PackedCausalLM(lm)) is None
    for layer in lm.model.layers:
        layer.self_attn.sliding_window = None
    assert fault(PackedValueModel(lm)) == WINDOWS


def test_a_model_trained_far_off_is_still_itself() -> None:
    """Its logprobs are in the thousands, where float32 has no thousandths left."""
    lm = packed("gemma3-tied")
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(100.0)
    model = PackedCausalLM(lm)
    assert fault(model) is None
    find_manner(lm)
    model.head.scale = 0.5
    assert fault(model) is not None


def test_nan_is_a_fault() -> None:
    lm = packed("llama")
    with torch.no_grad():
        lm.lm_head.weight[5] = torch.nan
    assert fault(PackedCausalLM(lm)) is not None


@pytest.mark.parametrize("dtype, nats", [(torch.float32, 1e-3), (torch.bfloat16, 0.25)])
def test_tolerances(dtype: torch.dtype, nats: float) -> None:
    assert fault_of([nats, nats, 0.0, 0.0], dtype) is None
    assert fault_of([0.0, 1.01 * nats, 0.0, 0.0], dtype) is not None
    assert fault_of([float("nan"), 0.0, 0.0, 0.0], dtype) is not None
