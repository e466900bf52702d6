"""What the ranks of a phase worked out apart, whole on every rank.

Each rank samples and scores a share of a phase's responses. Which rank learns from a response
changes with every minibatch, so all of it goes to all ranks, as flat tensors padded to the largest
share: 40 bytes for every token of a response, 20 MiB for 512 responses of 1024 tokens. Left out:
sending a rank only what it will need, which saves memory in phases of many millions of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2srm import distributed
from s2srm.packing import rows_of
from s2srm.rewards.base import RewardBatch, cumulative_lengths
from s2srm.rollout.base import Response
from s2srm.rollout.gather import gather_responses


class Shares:
    """Which rank works out what of a phase's responses.

    by_rank  the numbers of every rank's responses, the same on all ranks; each in exactly one
    mine     those of this rank
    """

    def __init__(self, by_rank: Sequence[Sequence[int]], responses: Sequence[Response]) -> None:
        """responses: all of the phase, by number."""
        self.by_rank = by_rank
        self.mine = list(by_rank[distributed.rank()])
        order = [number for share in by_rank for number in share]
        self._sequences = torch.tensor(order, dtype=torch.int64).argsort()
        offsets = cumulative_lengths([responses[number] for number in order])
        self._rows = rows_of(offsets, self._sequences.tolist())

    def rows(self, local: Tensor) -> Tensor:
        """(tokens of `mine`,) of every rank -> (tokens of all responses,) by number."""
        return self._in_order(local, self._rows)

    def sequences(self, local: Tensor) -> Tensor:
        """(len(mine),) of every rank -> (B,) by number."""
        return self._in_order(local, self._sequences)

    def _in_order(self, local: Tensor, inverse: Tensor) -> Tensor:
        whole = torch.cat(distributed.gather_tensors(local))
        return whole[inverse.to(whole.device)]


def gather_reward(shares: Shares, local: RewardBatch, responses: Sequence[Response]) -> RewardBatch:
    """Rewards of all responses from every rank's share."""

    def rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else shares.rows(values)

    divergence, corrections = local.divergence_index, local.corrections
    return RewardBatch(
        rewards=shares.rows(local.rewards),
        cu_rows=cumulative_lengths(responses).to(local.cu_rows.device),
        sequence_sum=shares.sequences(local.sequence_sum),
        raw_sum=shares.sequences(local.raw_sum),
        divergence_index=None if divergence is None else shares.sequences(divergence),
        rm_tokens=rows(local.rm_tokens),
        margin=rows(local.margin),
        corrections=None if corrections is None else gather_responses(shares.by_rank, corrections),
    )
