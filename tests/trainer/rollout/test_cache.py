"""A budget for keys and values: measured, kept to, and without influence on what is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny_models import tiny_model

from s2srm.config import SamplingConfig
from s2srm.errors import UserError
from s2srm.rollout.cache import CacheSize, measure_cache, rollout_batches
from s2srm.rollout.hf import HFRollout

LENGTHS = [9, 2, 30, 4, 4, 17, 1]
SIZE = CacheSize(fixed=0.0, per_token=2.0**20)


def batches(kv_cache_gib: float, batch_size: int = 4, pads: bool = True) -> list[list[int]]:
    sampling = SamplingConfig(10, batch_size=batch_size, kv_cache_gib=kv_cache_gib)
    return list(rollout_batches(LENGTHS, sampling, pads, SIZE if kv_cache_gib else None))


@pytest.mark.parametrize("name", ["llama", "gemma3-tied", "qwen3"])
def test_a_cache_is_measured(name: str) -> None:
    lm = tiny_model(name)
    config = lm.config
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    size = measure_cache(lm)
    if name == "gemma3-tied":  # windows of 4 tokens are full at once, in two of three layers
        values //= 3
        assert size.fixed > 0
    else:
        assert size.fixed == 0
    assert size.per_token == 4 * values


def test_batches_keep_to_the_budget() -> None:
    assert batches(0) == [[6, 1, 3, 4], [0, 5, 2]], "shortest first, by count alone"
    for mib in (40, 55, 80, 1000):
        found = batches(mib / 1024)
        assert [i for batch in found for i in batch] == [6, 1, 3, 4, 0, 5, 2]
        for batch in found:
            held = len(batch) * (max(LENGTHS[i] for i in batch) + 10)
            assert len(batch) == 1 or (held <= mib and len(batch) <= 4)
    assert len(batches(40 / 1024)) > len(batches(80 / 1024)) > len(batches(1000 / 1024))
    assert batches(1.0, pads=False) == [[6], [1], [3, 4], [0], [5], [2]]
    assert list(rollout_batches([], SamplingConfig(), True, None)) == []


def test_one_that_does_not_fit_is_named() -> None:
    with pytest.raises(UserError, match=r"kv_cache_gib 0\.03: one response of 40 tokens.* 0\.0391"):
        batches(0.03)


def test_responses_do_not_depend_on_the_budget() -> None:
    rollout = HFRollout(tiny_model("gemma3-tied"))
    prompts, seeds = [[5, 6, 7, 8], [9], [3, 4], [10, 11, 12]], [1, 2, 3, 4]
    one = measure_cache(rollout.model).of(4 + 6) / 2**30
    found = [
        rollout.generate(prompts, seeds, SamplingConfig(6, kv_cache_gib=gib), eos_id=2)
        for gib in (0.0, 1.01 * one, 2.5 * one)
    ]
    assert found[0] == found[1] == found[2]
