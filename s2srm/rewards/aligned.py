"""Token rewards from the alignment of a response with a generated correction (aligned mode; ours).

The minimum edit script from response to correction labels every token of the response:

    kept                        +positive
    substituted or deleted      -negative
    a gap before it, into which the correction inserts tokens: -negative, also if it is kept

An insertion after the last token marks the last token. The edit distance is rapidfuzz's, on ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from s2srm.config import TokenRewardConfig


def kept_tokens(response: Sequence[int], correction: Sequence[int]) -> list[bool]:
    """For every token of the response: the correction keeps it and inserts nothing before it."""
    kept = [False] * len(response)
    gaps: list[int] = []
    for edit in Levenshtein.opcodes(response, correction):
        if edit.tag == "equal":
            kept[edit.src_start : edit.src_end] = [True] * (edit.src_end - edit.src_start)
        elif edit.tag == "insert":
            gaps.append(min(edit.src_start, len(response) - 1))
    for gap in gaps:
        kept[gap] = False
    return kept


def aligned_rewards(
    responses: Sequence[Sequence[int]],
    corrections: Sequence[Sequence[int]],
    cfg: TokenRewardConfig,
) -> tuple[Tensor, Tensor]:
    """Rewards of B responses, at least one token each, against their corrections.

    Both are token ids with their end of sequence where there is one.

    Returns:
        (rewards (N,) float32, divergence_index (B,) int64: first token that is not kept, the
        response's length where there is none), on the CPU.
    """
    rewards: list[float] = []
    divergence: list[int] = []
    for response, correction in zip(responses, corrections, strict=True):
        kept = kept_tokens(response, correction)
        divisor = len(kept) if cfg.normalize_length else 1
        rewards += [(cfg.positive if keep else -cfg.negative) / divisor for keep in kept]
        divergence.append(kept.index(False) if False in kept else len(kept))
    return torch.tensor(rewards), torch.tensor(divergence, dtype=torch.int64)
