"""The clipped surrogate of PPO, row by row: values and derivatives by log p(target).

With d = log p - old (clamped to [-b, b] where max_log_ratio = b is given), A the advantage and, at
the level of sequences, d the mean over the sequence's live rows,

    r = e^d,   clip(r) = min(max(r, 1 - clip_low), 1 + clip_high)
    objective = min(r A, clip(r) A);  with dual_clip = c, for A < 0:  max(objective, c A)
    d objective / dd = r A  where the unclipped term is the objective and d is not bounded, else 0

and at the level of sequences every row of a sequence receives the mean of its rows' derivatives.
Source: PPO (arXiv 1707.06347, equation 7), the dual clip (arXiv 1912.09729, equation 5), sequences'
ratios (GSPO, arXiv 2507.18071, equations 5 to 7).
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from s2srm_kernels.cu_seqlens import find_segments
from s2srm_kernels.lm_head.head import Head


class Terms(NamedTuple):
    """(R,) each: the ratio, the objective, where a clipped term is the objective, where bounded."""

    ratio: Tensor
    objective: Tensor
    clips: Tensor
    bounded: Tensor


class Clip(NamedTuple):
    """The scalars; infinity is no bound."""

    low: float
    high: float
    dual: float
    max_log_ratio: float


class Surrogate(NamedTuple):
    """(R,) old log-probabilities and advantages of the live rows.

    lengths (B,): live rows of each sequence, at the level of sequences.
    """

    old: Tensor
    advantages: Tensor
    clip: Clip
    lengths: Tensor | None

    def terms(self, logprobs: Tensor, rows: slice) -> Terms:
        """Of a slice of the live rows; all of them at the level of sequences."""
        advantages = self.advantages[rows]
        log_ratio, bounded = self.bounded(self.mean(logprobs - self.old[rows]))
        ratio = log_ratio.exp()
        unclipped = ratio * advantages
        clipped = ratio.clamp(1 - self.clip.low, 1 + self.clip.high) * advantages
        objective, clips = torch.minimum(unclipped, clipped), clipped < unclipped
        if self.clip.dual != math.inf:
            floor = self.clip.dual * advantages
            lifted = (advantages < 0) & (floor > objective)
            objective, clips = torch.where(lifted, floor, objective), clips | lifted
        return Terms(ratio, objective, clips, bounded)

    def slope(self, logprobs: Tensor, rows: slice, weight: Tensor) -> Tensor:
        """(r,) derivative of sum(weight * objective) by log p."""
        terms = self.terms(logprobs, rows)
        slope = weight * (terms.ratio * self.advantages[rows])
        return self.mean(slope.masked_fill(terms.clips | terms.bounded, 0))

    def bounded(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """(clamped to [-max_log_ratio, max_log_ratio], True where that binds)."""
        bound = self.clip.max_log_ratio
        return difference.clamp(-bound, bound), difference.abs() > bound

    def mean(self, values: Tensor) -> Tensor:
        """The mean over each row's sequence, at every row; the identity at the level of tokens."""
        if self.lengths is None or values.numel() == 0:
            return values
        # One order of summation for each sequence, and no sequence sees another's values.
        sums = torch.segment_reduce(values.double(), "sum", lengths=self.lengths, unsafe=True)
        means = (sums / self.lengths.clamp(min=1)).to(values.dtype)
        return torch.repeat_interleave(means, self.lengths, output_size=values.shape[0])


def live_lengths(cu_seqlens: Tensor, head: Head) -> Tensor:
    """(B,) int64: live rows of each sequence; ValueError for a bad cu_seqlens (on CUDA a
    synchronisation)."""
    find_segments(cu_seqlens, head.hidden.shape[0])
    return torch.searchsorted(head.rows, cu_seqlens.long()).diff()
