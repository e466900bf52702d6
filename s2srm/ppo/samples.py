"""Some responses of a phase with the reward of every token, for people to read."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from s2srm import distributed
from s2srm.ppo.experience import Experience
from s2srm.rewards.base import RewardModel
from s2srm.rewards.seq2seq import Seq2SeqReward

NUM_SAMPLES = 8


def sample_rows(
    experience: Experience, reward_model: RewardModel, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Rows of samples.jsonl for the phase's first responses; all ranks must call it.

    prompt, response   text, special tokens shown
    tokens, rewards    one entry per response token; rewards scaled and clipped, without KL
    rm_tokens          the RM's own token at every position, null for a scalar or aligned reward
    divergence_index   null for a scalar reward
    correction         what the seq2seq RM writes when it generates, null for a scalar reward
    finished, sum      end of sequence reached; sum of rewards
    gold               null: PPO has no gold judge
    """
    reward, rollouts = experience.reward, experience.rollouts
    shown = range(min(NUM_SAMPLES, len(rollouts.responses)))
    mine = shown[distributed.rank() :: distributed.world_size()]
    corrections: list[str | None] = [None] * len(mine)
    if isinstance(reward_model, Seq2SeqReward):
        written = reward.corrections
        if written is None:
            written = reward_model.correct(
                [rollouts.prompts[i] for i in mine], [rollouts.responses[i] for i in mine]
            )
        else:
            written = [written[i] for i in mine]
        corrections = [_text(tokenizer, c.tokens) for c in written]
    offsets = reward.cu_rows.tolist()
    rows: list[tuple[int, dict[str, Any]]] = []
    for i, correction in zip(mine, corrections, strict=True):
        span = slice(offsets[i], offsets[i + 1])
        response = rollouts.responses[i]
        divergence, rm_tokens = reward.divergence_index, reward.rm_tokens
        row = {
            "prompt": _text(tokenizer, rollouts.prompts[i]),
            "response": _text(tokenizer, response.tokens),
            "tokens": [_text(tokenizer, [t]) for t in response.tokens],
            "rewards": reward.rewards[span].tolist(),
            "rm_tokens": None
            if rm_tokens is None
            else [_text(tokenizer, [t]) for t in rm_tokens[span].tolist()],
            "divergence_index": None if divergence is None else int(divergence[i]),
            "correction": correction,
            "finished": response.finished,
            "sum": float(reward.sequence_sum[i]),
            "gold": None,
        }
        rows.append((i, row))
    everyone = [pair for ranks_rows in distributed.gather_objects(rows) for pair in ranks_rows]
    return [row for _, row in sorted(everyone, key=lambda pair: pair[0])]


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)
