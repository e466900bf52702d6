"""Traced costs: what four small traces say of another size, and what they grow with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig

from s2srm.plan.passes import Passes, _run, _scalar, meta_batch
from s2srm.plan.tracing import AllocationTrace

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(layers=5, vocabulary=500):
    return LlamaConfig(num_hidden_layers=layers, vocab_size=vocabulary, **SIZES)


def gemma3(layers=5):
    """Tied, sliding windows in five layers of six."""
    return Gemma3TextConfig(
        num_hidden_layers=layers, vocab_size=500, head_dim=16, sliding_window=8, **SIZES
    )


def traced(config, kind, layers, sequences, checkpointing=False):
    module = Passes(config, "float32", flash=False)._module(layers, kind == "value", train=True)
    if checkpointing:
        module.lm.activation_checkpointing_enable({"use_reentrant": False})
    head = module.lm.get_output_embeddings().weight.numel() * 4
    with AllocationTrace(module, {head}) as trace:
        _scalar(_run(module.train(), kind, meta_batch(sequences, 32, 12))).backward()
    return trace.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [llama(), gemma3()], ids=["llama", "gemma3"])
def test_the_plane_through_small_traces_gives_the_deep_and_long_one(config, checkpointing):
    plane = Passes(config, "float32", flash=False).packed("ppo", True, checkpointing, 32, 12)
    predicted = plane.line(5).at(9)
    assert predicted == pytest.approx(traced(config, "ppo", 5, 9, checkpointing), rel=0.02)


def test_memory_is_linear_in_tokens_and_flat_in_the_vocabulary():
    small, large = (
        Passes(llama(vocabulary=size), "float32", flash=False)
        .packed("cross_entropy_none", True, False, 32, 12)
        .line(5)
        for size in (49152, 262144)
    )
    assert large.slope == pytest.approx(small.slope, rel=1e-3)
    assert abs(large.base - small.base) < 0.01 * small.at(64)
    assert small.at(128) == pytest.approx(2 * small.at(64), rel=0.01)


def test_checkpointing_keeps_less_and_flash_keeps_no_repeated_heads():
    passes = Passes(llama(), "float32", flash=False)
    whole, checkpointed = (
        passes.packed("value", True, checkpointing, 32, 12).line(32).at(64)
        for checkpointing in (False, True)
    )
    assert checkpointed < 0.2 * whole
    narrow = Passes(llama(), "bfloat16", flash=True).packed("value", True, False, 32, 12)
    wide = Passes(llama(), "bfloat16", flash=False).packed("value", True, False, 32, 12)
    assert narrow.line(5).at(64) < wide.line(5).at(64)


def test_the_cache_is_part_of_the_last_token():
    cache = 2 * 5 * 2 * 16 * 4 * 40  # keys and values, layers, heads, width, bytes, tokens
    line = Passes(llama(), "float32", flash=False).decode(40).line(5)
    assert cache <= line.slope < 2 * cache


def test_views_and_weights_are_not_counted_and_what_is_freed_is_uncounted():
    layer = torch.nn.Linear(8, 8, device="meta")
    with AllocationTrace(layer) as trace:
        out = layer(torch.empty(4, 8, device="meta"))
        assert layer.weight.t().shape == (8, 8)
        held = trace.now
        del out
    assert held == 2 * 4 * 8 * 4
    assert trace.now == 0
