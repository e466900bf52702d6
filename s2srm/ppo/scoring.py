"""A phase's responses as the models see them: each read on one rank, the numbers whole on all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from s2srm import distributed
from s2srm.balance import deal
from s2srm.config import PPOConfig
from s2srm.engine import Engine, PackedSegments
from s2srm.packing import Packed
from s2srm.ppo.exchange import Shares, gather_reward
from s2srm.ppo.guarding import check_reward
from s2srm.ppo.minibatches import Minibatch, Rollouts, responses_by_rank
from s2srm.rewards.base import RewardBatch, RewardModel


def score(model: RewardModel, rollouts: Rollouts, cfg: PPOConfig, phase: int) -> RewardBatch:
    """Rewards of all responses, dealt to the ranks by what the reward model reads.

    phase counts from 1, 0 is the calibration. TrainingDiverged, which names the rank, where a
    reward is not finite. All ranks must call it.
    """
    prompts, responses = rollouts.prompts, rollouts.responses
    lengths = [model.num_tokens(*pair) for pair in zip(prompts, responses, strict=True)]
    shares = Shares(deal(lengths, distributed.world_size()), responses)
    local = model([prompts[i] for i in shares.mine], [responses[i] for i in shares.mine])
    segments = rollouts.segments()
    check_reward(local, [segments[i] for i in shares.mine], cfg, phase)
    return gather_reward(shares, local, responses)


class Forwards:
    """The forwards of a plan: this rank's are packed once, and any engine may run over them."""

    def __init__(self, rollouts: Rollouts, plan: Sequence[Minibatch], device: torch.device) -> None:
        """plan: covers every response once."""
        self.shares = Shares(responses_by_rank(plan), rollouts.responses)
        place = {number: i for i, number in enumerate(self.shares.mine)}
        groups = [group for minibatch in plan for group in minibatch.microbatches]
        segments = rollouts.segments()
        self._packed = PackedSegments(
            [segments[number] for number in self.shares.mine],
            [[place[number] for number in group] for group in groups],
            device,
        )

    def logprobs(
        self, engine: Engine, temperature: float, keep: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """(N,) nats of the N response tokens, of logits / temperature. All ranks must call it.

        keep: takes the hidden states of the first forward, with their graph; where the engine
        keeps graphs, which it does in one process.
        """

        def forward(batch: Packed) -> tuple[Tensor]:
            hidden = None
            if keep is not None and batch is self._packed.batches[0]:
                hidden = engine.train_forward(batch, "hidden")
                keep(hidden)
            found = engine(
                batch, "logprobs", hidden=hidden, with_entropy=False, temperature=temperature
            )
            return (found.logprobs,)

        (found,) = self._packed.map(engine, forward)
        return self.shares.rows(found)

    def values(self, critic: Engine) -> tuple[Tensor, Tensor]:
        """(N,) before every response token, (B,) after the last. All ranks must call it."""

        def forward(batch: Packed) -> tuple[Tensor, Tensor]:
            values = critic(batch)
            return values[batch.rows], values[batch.last]

        rows, last = self._packed.map(critic, forward)
        return self.shares.rows(rows), self.shares.sequences(last)
