"""The scalar (Bradley-Terry) reward model at work: one score, read at the last token of prompt |
response (its end of sequence where it was sampled) and paid at that token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2srm.config import RewardConfig
from s2srm.engine import Engine, PackedSegments
from s2srm.packing import Packed, Segment
from s2srm.rewards.base import RewardBatch, cumulative_lengths, shape_rewards
from s2srm.rollout.base import Response


class ScalarReward:
    """The whole reward at the last token, from a frozen scalar RM."""

    def __init__(self, engine: Engine, cfg: RewardConfig, *, microbatch_tokens: int) -> None:
        """
        engine: around a PackedValueModel.
        microbatch_tokens: tokens of one packed forward.
        """
        self.engine = engine
        self.cfg = cfg
        self.microbatch_tokens = microbatch_tokens
        self.scale = 1.0

    def calibrate(self, scale: float) -> None:
        """Multiply every later reward by `scale`."""
        self.scale = scale

    def num_tokens(self, prompt: Sequence[int], response: Response) -> int:
        """Of prompt | response."""
        return len(prompt) + len(response.tokens)

    def __call__(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Response]
    ) -> RewardBatch:
        """Rewards of this rank's responses; all ranks must call it."""
        cu_rows = cumulative_lengths(responses).to(self.engine.device)
        scores = self.scores(prompts, responses)
        raw = torch.zeros(int(cu_rows[-1]), dtype=scores.dtype, device=scores.device)
        raw[cu_rows[1:].long() - 1] = scores
        rewards, raw_sum, sequence_sum = shape_rewards(raw, responses, self.cfg, self.scale)
        return RewardBatch(rewards, cu_rows, sequence_sum, raw_sum)

    def scores(self, prompts: Sequence[Sequence[int]], responses: Sequence[Response]) -> Tensor:
        """(B,) raw scores."""
        segments = [
            Segment([*prompt, *response.tokens], start=len(prompt))
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        packed = PackedSegments.within(segments, self.microbatch_tokens, self.engine.device)

        def forward(batch: Packed) -> tuple[Tensor]:
            return (self.engine(batch)[batch.last],)

        (scores,) = packed.map(self.engine, forward)
        return scores
