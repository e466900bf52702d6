"""One teacher-forced pass gives the rewards of an RM that generates; packing changes nothing."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path

import pytest
import torch
from rewards_naive import greedy, naive_token_rewards

sys.path.insert(0, str(Path(__file__).parents[1] / "ppo"))
from ppo_tiny import EOS, VOCAB, causal_engine, lm, template

from s2srm.config import RewardConfig, TokenRewardConfig
from s2srm.packing import split_rows
from s2srm.rewards.aligned import aligned_rewards
from s2srm.rewards.seq2seq import Seq2SeqReward, scoring_segment
from s2srm.rollout.base import Response

TEMPLATE = template()
PROMPTS = [[5], [6, 7, 8], [9, 4], [5, 6, 7, 8, 9, 10]]


def reward_model(model, budget=4096, **options) -> Seq2SeqReward:
    token = TokenRewardConfig(**{k: v for k, v in options.items() if k != "clip"})
    return Seq2SeqReward(
        causal_engine(copy.deepcopy(model)),
        TEMPLATE,
        RewardConfig(token=token, clip=options.get("clip", 0.0)),
        microbatch_tokens=budget,
        max_correction_tokens=16,
    )


def responses_near_corrections(model, count: int) -> tuple[list[list[int]], list[Response]]:
    """Responses that agree with what the RM would write for a while, and sometimes throughout.

    The RM's correction depends on the response, so a response is grown from its own teacher-forced
    argmaxes a few times over; some tokens are then replaced.
    """
    rng = random.Random(0)
    reward = reward_model(model)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    found = [
        [rng.choice([t for t in range(VOCAB) if t != EOS]) for _ in range(rng.randint(1, 10))]
        for _ in prompts
    ]
    for _ in range(6):
        responses = [Response([*body, EOS], True) for body in found]
        argmax = split_rows(
            reward.statistics(prompts, responses).argmax,
            reward(prompts, responses).cu_rows,
        )
        for body, row in zip(found, argmax, strict=True):
            upto = rng.randint(0, len(body))
            body[:upto] = [t if t != EOS else 5 for t in row.tolist()[:upto]]
    responses = []
    for body in found:
        finished = rng.random() < 0.7
        responses.append(Response([*body, EOS] if finished else body, finished))
    return prompts, responses


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3-tied"])
def test_teacher_forced_rewards_equal_those_of_a_generating_rm(name):
    model = lm(name, seed=3)
    prompts, responses = responses_near_corrections(model, 60)
    batch = reward_model(model)(prompts, responses)
    got = [row.tolist() for row in split_rows(batch.rewards, batch.cu_rows)]
    assert batch.divergence_index is not None
    indices = []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        rewards, index, _ = naive_token_rewards(model, TEMPLATE, prompt, response)
        assert (got[i], int(batch.divergence_index[i])) == (rewards, index), i
        indices.append(index)
    # The comparison is worth something only if responses diverge early, late and then agree again.
    assert len(set(indices)) > 3
    flat = batch.rewards.tolist()
    assert {1.0, 0.0, -1.0} <= set(flat)
    assert len(set(batch.rm_tokens.tolist())) > VOCAB // 3


def test_no_divergence_means_every_token_is_paid():
    model = lm("llama", seed=3, scale=0.0)  # all logits equal: the argmax is id 0
    batch = reward_model(model)([[5]], [Response([0, 0, 0], False)])
    assert batch.rewards.tolist() == [1.0, 1.0, 1.0]
    assert batch.divergence_index.tolist() == [3]


@pytest.mark.parametrize("name", ["llama", "gemma3-tied"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_packed_equals_unpacked(name, dtype, tolerance):
    model = lm(name, seed=3, dtype=dtype)
    prompts, responses = responses_near_corrections(model, 12)
    packed, single = reward_model(model, 4096), reward_model(model, 1)
    mine, theirs = packed(prompts, responses), single(prompts, responses)
    assert torch.equal(mine.rewards, theirs.rewards)
    assert torch.equal(mine.rm_tokens, theirs.rm_tokens)
    mine_stats = packed.statistics(prompts, responses)
    theirs_stats = single.statistics(prompts, responses)
    assert mine_stats.max_logit.dtype == dtype
    for a, b in zip(mine_stats, theirs_stats, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_rewards_follow_the_order_of_the_responses_whatever_the_packing():
    model = lm("llama", seed=3)
    prompts, responses = responses_near_corrections(model, 9)
    reward = reward_model(model, 40)
    together = reward(prompts, responses)
    rows = split_rows(together.margin, together.cu_rows)
    for i in (0, 4, 8):
        alone = reward([prompts[i]], [responses[i]])
        torch.testing.assert_close(alone.margin, rows[i], rtol=1e-5, atol=1e-5)


def test_scored_rows_are_the_sampled_ids_with_eos_only_where_it_was_sampled():
    finished = scoring_segment(TEMPLATE, [5, 6], Response([7, 8, EOS], True))
    given = [5, 6, 7, 8, *TEMPLATE.separator_ids]
    assert list(finished.tokens) == [*given, 7, 8, EOS] and finished.start == len(given)
    truncated = scoring_segment(TEMPLATE, [5, 6], Response([7, 8], False))
    assert list(truncated.tokens) == [*given, 7, 8]
    empty = scoring_segment(TEMPLATE, [5, 6], Response([EOS], True))
    assert list(empty.tokens) == [5, 6, *TEMPLATE.separator_ids, EOS]


def test_scale_and_clip_come_after_the_raw_sum():
    model = lm("llama", seed=3)
    prompts, responses = responses_near_corrections(model, 6)
    reward = reward_model(model, clip=0.3)
    reward.calibrate(0.5)
    batch, raw = reward(prompts, responses), reward_model(model)(prompts, responses)
    assert torch.equal(batch.rewards, raw.rewards.clamp(-0.6, 0.6) * 0.5)
    assert torch.equal(batch.raw_sum, raw.raw_sum)
    assert batch.rewards.abs().max() == pytest.approx(0.3)


def test_a_rank_without_responses_gets_empty_rewards():
    batch = reward_model(lm())([], [])
    assert batch.rewards.shape == (0,) and batch.cu_rows.tolist() == [0]
    aligned = reward_model(lm(), mode="aligned")([], [])
    assert aligned.rewards.shape == (0,) and aligned.corrections == []


@pytest.mark.parametrize("name", ["llama", "gemma3-tied"])
def test_aligned_mode_uses_the_generated_correction(name):
    model = lm(name, seed=3)
    prompts, responses = responses_near_corrections(model, 10)
    batch = reward_model(model, mode="aligned")(prompts, responses)
    written = [
        greedy(model, TEMPLATE.rm_input(p, r.tokens), 16, EOS)
        for p, r in zip(prompts, responses, strict=True)
    ]
    assert [c.tokens for c in batch.corrections] == written
    expected, index = aligned_rewards([r.tokens for r in responses], written, TokenRewardConfig())
    assert torch.equal(batch.rewards, expected) and torch.equal(batch.divergence_index, index)
    assert batch.rm_tokens is None and {1.0, -1.0} <= set(batch.rewards.tolist())
