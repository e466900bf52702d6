"""Parameters counted on the meta device, of the shipped architectures and of critics."""

from __future__ import annotations

import pytest

from s2srm.config import ModelConfig
from s2srm.plan.counts import count
from s2srm.plan.sources import find_architecture, shipped

PUBLISHED = {
    "google/gemma-2b": 2_506_172_416,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_published(name):
    found = count(find_architecture(ModelConfig(path=name), "model.path").config)
    assert found.total == PUBLISHED[name]


def test_every_shipped_architecture_is_counted():
    assert shipped().keys() == PUBLISHED.keys()


def test_a_critic_trains_its_score_head_and_not_its_own_untied_head():
    tied = count(find_architecture(ModelConfig(path="google/gemma-2b"), "model.path").config)
    untied = count(
        find_architecture(ModelConfig(path="meta-llama/Llama-2-7b-hf"), "model.path").config
    )
    assert tied.trained(value=True) == tied.total + 2048 + 1
    assert untied.trained(value=True) == untied.total - 32000 * 4096 + 4096 + 1
    assert untied.held(value=True) == untied.total + 4096 + 1
