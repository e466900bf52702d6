"""An RM's feedback on given responses, for people to read: correction and token rewards.

The rewards are in the RM's raw units (no scaling, no clipping), from the teacher-forced pass; the
correction is generated greedily. Both say the same up to the divergence.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from s2srm.config import EngineConfig, RewardConfig, TokenRewardConfig
from s2srm.data.schema import PromptText
from s2srm.engine.build import build_engine
from s2srm.errors import UserError
from s2srm.evaluation.inputs import Reader
from s2srm.models.load import load_causal_lm
from s2srm.packing import split_rows
from s2srm.rewards.seq2seq import Seq2SeqReward
from s2srm.rollout.base import Response

logger = logging.getLogger(__name__)

_MICROBATCH_TOKENS = 8192


@dataclass(frozen=True)
class Feedback:
    """What the RM says about one response, token by token.

    tokens, rewards and rm_tokens (what the RM would write there; None in aligned mode) have one
    entry per response token, end of sequence included. divergence_index is the first token that the
    RM would have written otherwise, None where there is none.
    """

    prompt: str
    response: str
    tokens: list[str]
    rewards: list[float]
    rm_tokens: list[str] | None
    divergence_index: int | None
    correction: str
    correction_tokens: list[str]
    finished: bool
    sum: float

    def row(self) -> dict[str, Any]:
        """As one line of feedback.jsonl."""
        return asdict(self)


class FeedbackModel:
    """A trained seq2seq RM with its tokenizer and template."""

    def __init__(
        self, reader: Reader, token: TokenRewardConfig, *, max_correction_tokens: int
    ) -> None:
        """Load the weights of what `inputs.read_reward_model` found, whole on every rank."""
        self.tokenizer, self.template = reader.tokenizer, reader.template
        engine = build_engine(
            lambda zero: load_causal_lm(reader.cfg, zero_config=zero, train=False),
            EngineConfig(zero_stage=0),
            None,
        )
        cfg = RewardConfig(kind="seq2seq", model=reader.cfg, token=token, scale="none")
        self._reward = Seq2SeqReward(
            engine,
            self.template,
            cfg,
            microbatch_tokens=_MICROBATCH_TOKENS,
            max_correction_tokens=max_correction_tokens,
        )

    def token_rewards(
        self, prompts: Sequence[list[int]], responses: Sequence[Response]
    ) -> tuple[list[list[float]], list[list[int]] | None, list[int]]:
        """(rewards per token, the RM's own tokens or None, divergence index) of each response."""
        batch = self._reward(prompts, responses)
        assert batch.divergence_index is not None
        rm_tokens = None
        if batch.rm_tokens is not None:
            rm_tokens = [part.tolist() for part in split_rows(batch.rm_tokens, batch.cu_rows)]
        rewards = [part.tolist() for part in split_rows(batch.rewards, batch.cu_rows)]
        return rewards, rm_tokens, batch.divergence_index.tolist()

    def explain(
        self,
        prompts: Sequence[list[int]],
        responses: Sequence[Response],
        prompt_texts: Sequence[str],
    ) -> list[Feedback]:
        """Rewards and generated correction of each response."""
        rewards, rm_tokens, divergence = self.token_rewards(prompts, responses)
        corrections = self._reward.correct(prompts, responses)
        found: list[Feedback] = []
        for i, (response, correction) in enumerate(zip(responses, corrections, strict=True)):
            found.append(
                Feedback(
                    prompt=prompt_texts[i],
                    response=plain_text(self.tokenizer, response),
                    tokens=token_texts(self.tokenizer, response.tokens),
                    rewards=rewards[i],
                    rm_tokens=None
                    if rm_tokens is None
                    else [str(self.tokenizer.decode([t])) for t in rm_tokens[i]],
                    divergence_index=divergence[i] if divergence[i] < len(rewards[i]) else None,
                    correction=plain_text(self.tokenizer, correction),
                    correction_tokens=token_texts(self.tokenizer, correction.tokens),
                    finished=response.finished,
                    sum=sum(rewards[i]),
                )
            )
        return found


def encode(reader: Reader, prompt: PromptText, response: str) -> tuple[list[int], Response]:
    """Prompt ids, and the response with its end of sequence. UserError where either is empty."""
    tokens = reader.template.encode_response(reader.tokenizer, response, prompt)
    if not tokens:
        raise UserError("the response is empty")
    ids = reader.template.encode_prompt(reader.tokenizer, prompt)
    if not ids:
        raise UserError("the prompt is empty")
    return ids, Response([*tokens, reader.template.eos_id], finished=True)


def correction_limit(
    reader: Reader, prompt: list[int], response: Response, wanted: int | None, default: int
) -> int:
    """Longest correction, in tokens: as wanted, or the default cut to the positions left.

    UserError if the model has too few positions for what it reads, or for what is wanted.
    """
    read = len(reader.template.rm_input(prompt, response.tokens))
    total = read + len(response.tokens)
    if reader.positions is None:
        return wanted or default
    if total > reader.positions:
        raise UserError(
            f"prompt ({len(prompt)} tokens), response ({len(response.tokens)}), separator and the "
            f"response again take {total} positions, over the {reader.positions} of {reader.where}"
        )
    room = reader.positions - read
    if wanted is not None and wanted > room:
        raise UserError(
            f"max_new_tokens {wanted}: prompt, response and separator take {read} of the "
            f"{reader.positions} positions of {reader.where}; at most {room} fits"
        )
    if wanted is None and default > room:
        logger.info("corrections of at most %d tokens: the model has no more positions", room)
    return wanted or min(default, room)


def plain_text(tokenizer: PreTrainedTokenizerBase, response: Response) -> str:
    """The response as text, without its end of sequence and without space around it."""
    tokens = response.tokens[:-1] if response.finished else response.tokens
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Text of each token as it appears in the whole: joined, they are the decoded text.

    A token that only begins a character has an empty text; the token that ends it has it all.
    """
    texts: list[str] = []
    before = ""
    for i in range(len(tokens)):
        text = str(tokenizer.decode(list(tokens[: i + 1])))
        if text.endswith("\ufffd") or not text.startswith(before):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        before = text
    return texts
