"""Token rewards of a trained RM from one teacher-forced pass, against an RM that really generates.

The RM is trained by the stages themselves on a miniature world, untied and tied, and the responses
are sampled from the SFT policy at temperature 1, so that corrections and divergences are real ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from s2srm.config import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RMConfig,
    SamplingConfig,
    SFTConfig,
)
from s2srm.data.templates import Template
from s2srm.engine import build_engine
from s2srm.models.load import load_causal_lm, load_lm, load_tokenizer
from s2srm.packing import split_rows
from s2srm.rewards.seq2seq import Seq2SeqReward
from s2srm.rollout.hf import HFRollout
from s2srm.supervised import rm, sft
from s2srm.worlds import WorldSizes, get_world

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer" / "rewards"))
from rewards_naive import naive_token_rewards

NUM_RESPONSES = 120
MAX_TOKENS = 40
WORLD = get_world("safety")


def train(folder: Path, tied: bool) -> tuple[ModelConfig, ModelConfig]:
    """SFT policy and RM, trained for a quarter of a minute."""
    WORLD.write(folder, WorldSizes(4000, 2000, 8, 1000, 8, 8))
    if tied:
        config = WORLD.model_config()
        config.tie_word_embeddings = True
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    common = {"template": WORLD.template, "batch_size": 32, "microbatch_tokens": 4096}
    optim = OptimConfig(lr=2e-3, warmup_steps=10)
    start = ModelConfig(path=str(folder / "model"))
    policy = ModelConfig(path=str(folder / "sft"))
    reward = ModelConfig(path=str(folder / "rm"))
    data = DataConfig(path=str(folder / "sft.jsonl"))
    sft.run(
        SFTConfig(
            output=policy.path,
            model=start,
            data=data,
            optim=optim,
            max_steps=80,
            response_column="response",
            **common,
        )
    )
    pairs = DataConfig(path=str(folder / "preferences.jsonl"))
    rm.run(
        RMConfig(output=reward.path, model=policy, data=pairs, optim=optim, max_steps=40, **common)
    )
    return policy, reward


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_teacher_forced_rewards_equal_generated_ones(tmp_path: Path, tied: bool) -> None:
    policy, reward_model = train(tmp_path, tied)
    tokenizer = load_tokenizer(policy)
    template = Template.load(reward_model.path)
    rows = (tmp_path / "prompts_train.jsonl").read_text().splitlines()[:NUM_RESPONSES]
    prompts = [template.encode_prompt(tokenizer, json.loads(row)["prompt"]) for row in rows]
    responses = HFRollout(load_lm(policy, train=False)).generate(
        prompts, list(range(NUM_RESPONSES)), SamplingConfig(MAX_TOKENS, 1.0, 60), template.eos_id
    )
    engine = build_engine(
        lambda zero: load_causal_lm(reward_model, zero_config=zero, train=False),
        EngineConfig(),
        None,
    )
    reward = Seq2SeqReward(
        engine, template, RewardConfig(), microbatch_tokens=4096, max_correction_tokens=MAX_TOKENS
    )
    batch = reward(prompts, responses)
    got = [row.tolist() for row in split_rows(batch.rewards, batch.cu_rows)]
    assert batch.divergence_index is not None

    generating = load_lm(reward_model, train=False)
    head, embedding = generating.get_output_embeddings(), generating.get_input_embeddings()
    assert head is not None and (head.weight is embedding.weight) == tied
    indices: list[int] = []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        rewards, index, _ = naive_token_rewards(generating, template, prompt, response)
        assert (got[i], int(batch.divergence_index[i])) == (rewards, index), i
        indices.append(index)
    # Worth something only if responses diverge early, late and not at all.
    assert len(set(indices)) > 5
    assert any(index == len(r.tokens) for index, r in zip(indices, responses, strict=True))
