"""The seq2seq reward model at work: one teacher-forced pass over prompt | response | separator |
response gives every token's reward; no generation (see token.py for why that is enough).

In aligned mode the RM does write a correction, greedily, and the reward comes from its alignment
with the response. `correct` writes corrections in either mode, for people to read.
Left out: sampled and beam-searched corrections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s2srm.config import RewardConfig, SamplingConfig
from s2srm.data.templates import Template
from s2srm.engine import Engine, PackedSegments
from s2srm.models.causal import PackedCausalLM
from s2srm.packing import Packed, Segment
from s2srm.rewards.aligned import aligned_rewards
from s2srm.rewards.base import RewardBatch, cumulative_lengths, shape_rewards
from s2srm.rewards.token import rewards_from_stats
from s2srm.rollout.base import Response
from s2srm.rollout.build import build_rollout
from s2srm.rollout.hf import named_tensors


class ResponseStats(NamedTuple):
    """What the RM thinks of every response token, (N,) each, in the order of the responses."""

    argmax: Tensor
    rank: Tensor
    max_logit: Tensor
    target_logit: Tensor


class Seq2SeqReward:
    """A reward for every token, from a frozen seq2seq RM."""

    def __init__(
        self,
        engine: Engine,
        template: Template,
        cfg: RewardConfig,
        *,
        microbatch_tokens: int,
        max_correction_tokens: int,
        generation_batch_size: int = 64,
        kv_cache_gib: float = 0.0,
    ) -> None:
        """
        engine: around a PackedCausalLM.
        microbatch_tokens: tokens of one packed forward.
        max_correction_tokens: longest correction that is generated, end of sequence included.
        generation_batch_size: most corrections that are generated at a time.
        kv_cache_gib: what their keys and values may take; 0 for no limit.
        """
        assert isinstance(engine.module, PackedCausalLM)
        self.engine = engine
        self.template = template
        self.cfg = cfg
        self.microbatch_tokens = microbatch_tokens
        self.sampling = SamplingConfig(
            max_correction_tokens, 0.0, generation_batch_size, kv_cache_gib
        )
        self.generator = build_rollout(engine.module.lm)
        self.scale = 1.0

    def calibrate(self, scale: float) -> None:
        """Multiply every later reward by `scale`."""
        self.scale = scale

    def num_tokens(self, prompt: Sequence[int], response: Response) -> int:
        """Of prompt | response | separator | response."""
        return len(scoring_segment(self.template, prompt, response).tokens)

    def __call__(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Response]
    ) -> RewardBatch:
        """Rewards of this rank's responses; all ranks must call it."""
        if self.cfg.token.mode == "aligned":
            return self._aligned(prompts, responses)
        stats = self.statistics(prompts, responses)
        tokens = torch.tensor([t for r in responses for t in r.tokens], dtype=torch.int64)
        cu_rows = cumulative_lengths(responses).to(self.engine.device)
        raw, divergence_index = rewards_from_stats(
            stats, tokens.to(self.engine.device), cu_rows, self.cfg.token
        )
        rewards, raw_sum, sequence_sum = shape_rewards(raw, responses, self.cfg, self.scale)
        return RewardBatch(
            rewards=rewards,
            cu_rows=cu_rows,
            sequence_sum=sequence_sum,
            raw_sum=raw_sum,
            divergence_index=divergence_index,
            rm_tokens=stats.argmax,
            margin=(stats.max_logit - stats.target_logit).float(),
        )

    def statistics(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Response]
    ) -> ResponseStats:
        """The RM's statistics under every response token, fed with the response so far."""
        segments = [
            scoring_segment(self.template, prompt, response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        packed = PackedSegments.within(segments, self.microbatch_tokens, self.engine.device)

        def forward(batch: Packed) -> ResponseStats:
            stats = self.engine(batch, "token_stats")
            return ResponseStats(*(getattr(stats, name) for name in ResponseStats._fields))

        return ResponseStats(*packed.map(self.engine, forward))

    def correct(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Response]
    ) -> list[Response]:
        """The RM's greedy correction of every response; all ranks must call it."""
        inputs = [
            self.template.rm_input(list(prompt), response.tokens)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        assert isinstance(self.engine.module, PackedCausalLM)
        with self.engine.gathered():
            self.generator.update_weights(named_tensors(self.engine.module.lm))
            corrections = self.generator.generate(
                inputs, [0] * len(inputs), self.sampling, self.template.eos_id
            )
            self.generator.drop_weights()
        return corrections

    def _aligned(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Response]
    ) -> RewardBatch:
        corrections = self.correct(prompts, responses)
        raw, divergence_index = aligned_rewards(
            [r.tokens for r in responses], [c.tokens for c in corrections], self.cfg.token
        )
        raw = raw.to(self.engine.device)
        rewards, raw_sum, sequence_sum = shape_rewards(raw, responses, self.cfg, self.scale)
        return RewardBatch(
            rewards=rewards,
            cu_rows=cumulative_lengths(responses).to(self.engine.device),
            sequence_sum=sequence_sum,
            raw_sum=raw_sum,
            divergence_index=divergence_index.to(self.engine.device),
            corrections=corrections,
        )


def scoring_segment(template: Template, prompt: Sequence[int], response: Response) -> Segment:
    """prompt | response | separator | response (+ end of sequence where it was sampled)."""
    given = template.rm_input(list(prompt), response.tokens)
    return Segment([*given, *response.tokens], start=len(given))
