"""Which responses of a phase make up which minibatch, on which rank, in which forward.

The minibatches follow from seeds that all ranks share, so any number of ranks sees the same ones.
Within each the responses are dealt to the ranks by their tokens (`s2srm.balance`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from s2srm import distributed
from s2srm.balance import deal_forwards, max_over_mean
from s2srm.packing import Segment
from s2srm.rollout.base import Response, sampling_seed


@dataclass(frozen=True)
class Rollouts:
    """The responses of one phase, of all ranks: responses[i] answers prompts[i]."""

    prompts: list[list[int]]
    responses: list[Response]

    def segments(self) -> list[Segment]:
        """prompt | response, the response predicted."""
        return [
            Segment([*prompt, *response.tokens], start=len(prompt))
            for prompt, response in zip(self.prompts, self.responses, strict=True)
        ]


@dataclass(frozen=True)
class Minibatch:
    """One optimiser step.

    by_rank     the responses (numbers into Rollouts) that every rank packs into each forward
    tokens      of prompts and responses in these forwards
    num_tokens  response tokens of the minibatch over all ranks: what its losses are divided by
    """

    by_rank: list[list[list[int]]]
    tokens: list[list[int]]
    num_tokens: int

    @property
    def microbatches(self) -> list[list[int]]:
        """This rank's."""
        return self.by_rank[distributed.rank()]


def prompt_schedule(num_prompts: int, count: int, seed: int, phase: int) -> list[int]:
    """The prompts of a phase: the next `count` of an endless row of shuffled passes over all."""
    chosen: list[int] = []
    shuffles: dict[int, list[int]] = {}
    for position in range(phase * count, (phase + 1) * count):
        epoch, offset = divmod(position, num_prompts)
        if epoch not in shuffles:
            shuffles[epoch] = permutation(num_prompts, seed, -1, epoch)
        chosen.append(shuffles[epoch][offset])
    return chosen


def permutation(count: int, seed: int, phase: int, epoch: int) -> list[int]:
    """A shuffle of range(count) that every rank agrees on; another one for every epoch."""
    # Responses have non-negative numbers: negative ones are streams of their own.
    generator = torch.Generator().manual_seed(sampling_seed(seed, phase, -1 - epoch))
    return torch.randperm(count, generator=generator).tolist()


def plan_epoch(
    rollouts: Rollouts,
    order: Sequence[int],
    minibatch_size: int,
    microbatch_tokens: int,
    num_ranks: int,
) -> list[Minibatch]:
    """Cut one pass over a phase into minibatches, and each rank's part of each into forwards.

    Args:
        order: the phase's responses, shuffled (see `permutation`).
        minibatch_size: responses per optimiser step over all ranks; the last may be smaller.
        microbatch_tokens: tokens of prompt and response per forward of a rank.
    """
    plan: list[Minibatch] = []
    for first in range(0, len(order), minibatch_size):
        chosen = order[first : first + minibatch_size]
        num_tokens = [len(rollouts.responses[i].tokens) for i in chosen]
        lengths = [len(rollouts.prompts[i]) + n for i, n in zip(chosen, num_tokens, strict=True)]
        dealt = deal_forwards(lengths, num_ranks, microbatch_tokens)
        plan.append(
            Minibatch(
                [[[chosen[i] for i in group] for group in groups] for groups in dealt],
                [[sum(lengths[i] for i in group) for group in groups] for groups in dealt],
                sum(num_tokens),
            )
        )
    return plan


def responses_by_rank(plan: Sequence[Minibatch]) -> list[list[int]]:
    """The responses that every rank learns from in a pass over the phase."""
    return [
        sorted(i for minibatch in plan for group in minibatch.by_rank[rank] for i in group)
        for rank in range(len(plan[0].by_rank))
    ]


def balance_metrics(plan: Sequence[Minibatch]) -> dict[str, float]:
    """How long ranks wait for each other in the updates of these minibatches.

    balance/tokens_max_over_mean  tokens of the fullest rank over the mean, in the worst minibatch
    balance/idle_fraction         share of the ranks' time that they wait for the fullest of each
                                  forward, a forward taken to cost its tokens
    """
    worst = max(max_over_mean([sum(tokens) for tokens in m.tokens]) for m in plan)
    used = sum(sum(map(sum, m.tokens)) for m in plan)
    taken = sum(
        len(m.tokens) * sum(map(max, itertools.zip_longest(*m.tokens, fillvalue=0))) for m in plan
    )
    return {"balance/tokens_max_over_mean": worst, "balance/idle_fraction": 1 - used / taken}
