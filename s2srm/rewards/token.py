"""Token rewards from the RM's teacher-forced statistics (method: reward extracting).

With a_t the token that the RM puts first after (x, y, y_<t) and k the first t with a_t != y_t:

    r_t = +positive    t < k
    r_t = -negative    t >= k and a_t != y_t
    r_t = match        t >= k and a_t == y_t

Only "+ until it diverges, - for diverging tokens" is stated by the paper (arXiv 2409.00162,
Figure 2); `match`, and rank and margin in the place of the argmax, are ours. Greedy decoding by the
RM conditions on y itself up to k, so the argmaxes of one teacher-forced pass are those of the
generated correction up to k, and no generation is needed.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from s2srm.config import TokenRewardConfig
from s2srm_kernels import token_rewards


class TokenStats(Protocol):
    """What is read of the kernel `linear_token_stats`, each (N,)."""

    @property
    def argmax(self) -> Tensor: ...
    @property
    def rank(self) -> Tensor: ...
    @property
    def max_logit(self) -> Tensor: ...
    @property
    def target_logit(self) -> Tensor: ...


def rewards_from_stats(
    stats: TokenStats, response: Tensor, cu_rows: Tensor, cfg: TokenRewardConfig
) -> tuple[Tensor, Tensor]:
    """The formula above, divided by the response's length if `normalize_length`.

    Args:
        stats: of the RM's rows that predict the response.
        response: (N,) int64, the tokens of the B responses end to end.
        cu_rows: (B+1,) int32 offsets of the responses.

    Returns:
        (rewards (N,) float32, divergence_index (B,) int64, local to each response).
    """
    if cfg.divergence == "argmax":
        signal = stats.argmax
    elif cfg.divergence == "rank":
        signal = stats.rank
    else:
        signal = stats.max_logit - stats.target_logit
    rewards, divergence_index = token_rewards(
        response,
        signal,
        cu_rows,
        divergence=cfg.divergence,
        top_k=cfg.top_k,
        max_margin=cfg.max_margin,
        positive=cfg.positive,
        negative=cfg.negative,
        match=cfg.match,
    )
    if cfg.normalize_length:
        rewards = divide_by_length(rewards, cu_rows)
    return rewards, divergence_index


def divide_by_length(rewards: Tensor, cu_rows: Tensor) -> Tensor:
    """(N,) rewards, each divided by the number of tokens of its response."""
    lengths = cu_rows.diff().long()
    return rewards / torch.repeat_interleave(lengths, lengths).to(rewards)
