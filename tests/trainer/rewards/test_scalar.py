"""The scalar reward is the score at the last token, and all of it stands there."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ppo"))
from ppo_tiny import EOS, lm, value_engine

from s2srm.config import RewardConfig
from s2srm.rewards.scalar import ScalarReward
from s2srm.rollout.base import Response

PROMPTS = [[5, 6], [7], [8, 9, 10, 11]]
RESPONSES = [Response([5, EOS], True), Response([6, 7, 8, 9], False), Response([EOS], True)]


def build(model, budget=4096, cfg=RewardConfig(kind="scalar")):  # noqa: B008
    engine = value_engine(copy.deepcopy(model), seed=5)
    return ScalarReward(engine, cfg, microbatch_tokens=budget), engine


@pytest.mark.parametrize("name", ["llama", "gemma3-tied"])
def test_score_of_the_last_token_of_the_plain_model(name):
    model = lm(name)
    reward, engine = build(model)
    batch = reward(PROMPTS, RESPONSES)
    score = engine.module.score
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = torch.tensor([[*prompt, *response.tokens]])
        with torch.no_grad():
            hidden = model.base_model(ids).last_hidden_state[0, -1]
        expected = float(hidden @ score.weight[0] + score.bias[0])
        row = batch.rewards[batch.cu_rows[b] : batch.cu_rows[b + 1]].tolist()
        assert row[:-1] == [0.0] * (len(row) - 1)
        assert row[-1] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert float(batch.raw_sum[b]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert batch.divergence_index is None and batch.rm_tokens is None


def test_packing_and_order_change_nothing():
    model = lm("llama")
    big, small = build(model, 4096)[0], build(model, 1)[0]
    torch.testing.assert_close(
        big(PROMPTS, RESPONSES).rewards, small(PROMPTS, RESPONSES).rewards, rtol=1e-5, atol=1e-5
    )
    backwards = big(PROMPTS[::-1], RESPONSES[::-1]).raw_sum.flip(0)
    torch.testing.assert_close(backwards, big(PROMPTS, RESPONSES).raw_sum, rtol=1e-5, atol=1e-5)


def test_penalty_for_a_missing_eos():
    model = lm("llama")
    plain = build(model)[0](PROMPTS, RESPONSES)
    fined = build(model, cfg=RewardConfig(kind="scalar", missing_eos_penalty=2.0))[0]
    difference = plain.rewards - fined(PROMPTS, RESPONSES).rewards
    assert difference.tolist() == pytest.approx([0, 0, 0, 0, 0, 2.0, 0])


def test_no_responses():
    batch = build(lm())[0]([], [])
    assert batch.rewards.shape == (0,) and batch.raw_sum.shape == (0,)
