"""What a reward model hands to PPO, and what every reward goes through before it gets there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from s2srm.config import RewardConfig
from s2srm.engine.base import Engine
from s2srm.rollout.base import Response


@dataclass(frozen=True)
class RewardBatch:
    """Rewards of B responses with N tokens in all (end of sequence included where it was sampled).

    rewards           (N,) float32: after scaling and clipping, before any KL penalty
    cu_rows           (B+1,) int32: tokens of response b are cu_rows[b]:cu_rows[b+1]
    sequence_sum      (B,) float32: sum of `rewards` over each response
    raw_sum           (B,) float32: the same before scaling and clipping
    divergence_index  (B,) int64: first token that the RM would have written otherwise, the
                      response's length where there is none; None for a scalar RM
    rm_tokens         (N,) int64: the RM's own token at every position; None where it has none
    margin            (N,) float32: RM's max logit - logit of the token, in nats; None likewise
    corrections       the RM's generated corrections (aligned mode only), else None
    """

    rewards: Tensor
    cu_rows: Tensor
    sequence_sum: Tensor
    raw_sum: Tensor
    divergence_index: Tensor | None = None
    rm_tokens: Tensor | None = None
    margin: Tensor | None = None
    corrections: list[Response] | None = None


class RewardModel(Protocol):
    """Scores responses. Every rank calls it the same number of times."""

    @property
    def engine(self) -> Engine | None:
        """Around the model, if there is one: it may sleep while there is nothing to score."""
        ...

    def __call__(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Response]
    ) -> RewardBatch:
        """Rewards of this rank's responses; it may have none."""
        ...

    def num_tokens(self, prompt: Sequence[int], response: Response) -> int:
        """How many tokens it reads for this response: what scoring it costs."""
        ...

    def calibrate(self, scale: float) -> None:
        """Multiply every later reward by `scale`."""
        ...


def cumulative_lengths(responses: Sequence[Response]) -> Tensor:
    """(B+1,) int32 offsets of the responses in a flat row of tokens."""
    lengths = torch.tensor([0, *(len(r.tokens) for r in responses)])
    return lengths.cumsum(0).to(torch.int32)


def sequence_sums(values: Tensor, cu_rows: Tensor) -> Tensor:
    """(N,) -> (B,): the sum over every sequence."""
    lengths = cu_rows.diff().long()
    owner = torch.repeat_interleave(
        torch.arange(lengths.numel(), device=values.device), lengths.to(values.device)
    )
    return values.new_zeros(lengths.numel()).index_add(0, owner, values)


def shape_rewards(
    raw: Tensor, responses: Sequence[Response], cfg: RewardConfig, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Missing-EOS penalty, then scale, then clip; the KL penalty is subtracted after all of them.

    Args:
        raw: (N,) the reward model's own rewards.
        responses: the B responses that the rows belong to.

    Returns:
        (rewards (N,), raw_sum (B,) with the penalty and without scale and clip, sequence_sum (B,)
        of the rewards).
    """
    cu_rows = cumulative_lengths(responses).to(raw.device)
    raw = raw.clone()
    if cfg.missing_eos_penalty:
        truncated = torch.tensor(
            [not r.finished for r in responses], dtype=torch.bool, device=raw.device
        )
        raw[cu_rows[1:].long()[truncated] - 1] -= cfg.missing_eos_penalty
    rewards = raw * scale
    if cfg.clip > 0:
        rewards = rewards.clamp(-cfg.clip, cfg.clip)
    return rewards, sequence_sums(raw, cu_rows), sequence_sums(rewards, cu_rows)
