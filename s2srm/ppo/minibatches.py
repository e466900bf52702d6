"""Which responses of a phase make up which minibatch, on which rank, in which forward.

Everything follows from seeds that all ranks share, and response i of a phase belongs to rank
i % world, so any number of ranks sees the same minibatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from s2srm import distributed
from s2srm.packing import Segment, split_by_budget
from s2srm.rollout.base import Response, sampling_seed


@dataclass(frozen=True)
class Rollouts:
    """This rank's responses of one phase: number index[i] of the phase answers prompts[i]."""

    index: list[int]
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

    microbatches  this rank's responses (numbers into Rollouts) packed into each forward
    num_tokens    response tokens of the minibatch over all ranks: what its losses are divided by
    """

    microbatches: list[list[int]]
    num_tokens: int


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
) -> list[Minibatch]:
    """Cut one pass over a phase into minibatches, and this rank's part of each into forwards.

    Args:
        order: the phase's responses, all ranks', shuffled (see `permutation`).
        minibatch_size: responses per optimiser step over all ranks; the last may be smaller.
        microbatch_tokens: tokens of prompt and response per forward.
    """
    local = {number: i for i, number in enumerate(rollouts.index)}
    lengths = [
        len(prompt) + len(response.tokens)
        for prompt, response in zip(rollouts.prompts, rollouts.responses, strict=True)
    ]
    plan: list[list[list[int]]] = []
    num_tokens: list[int] = []
    for first in range(0, len(order), minibatch_size):
        mine = [local[i] for i in order[first : first + minibatch_size] if i in local]
        bins = split_by_budget([lengths[i] for i in mine], microbatch_tokens)
        plan.append([[mine[i] for i in group] for group in bins])
        num_tokens.append(sum(len(rollouts.responses[i].tokens) for i in mine))
    totals = distributed.sum_over_ranks(
        torch.tensor(num_tokens, dtype=torch.int64, device=distributed.device())
    )
    return [
        Minibatch(microbatches, int(total))
        for microbatches, total in zip(plan, totals.tolist(), strict=True)
    ]
