"""Token rewards from statistics: the rule, its options, and the length normalisation."""

from typing import NamedTuple

import pytest
import torch

from s2srm.config import TokenRewardConfig
from s2srm.rewards.token import rewards_from_stats


class Stats(NamedTuple):
    argmax: torch.Tensor
    rank: torch.Tensor
    max_logit: torch.Tensor
    target_logit: torch.Tensor


RESPONSE = torch.tensor([5, 6, 7, 8, 2, 9, 2])
CU_ROWS = torch.tensor([0, 5, 7], dtype=torch.int32)
#                 agree: 1  1  0  1  0 | 1  1
ARGMAX = torch.tensor([5, 6, 1, 8, 1, 9, 2])
RANK = torch.tensor([0, 0, 3, 0, 1, 0, 0])
MARGIN = torch.tensor([0.0, 0.0, 2.0, 0.0, 0.5, 0.0, 0.0])
STATS = Stats(ARGMAX, RANK, MARGIN + 1.5, torch.full((7,), 1.5))


def rewards(**options):
    got, index = rewards_from_stats(STATS, RESPONSE, CU_ROWS, TokenRewardConfig(**options))
    return got.tolist(), index.tolist()


def test_positive_until_divergence_then_only_diverging_tokens_are_punished():
    got, index = rewards()
    assert got == [1, 1, -1, 0, -1, 1, 1]
    assert index == [2, 2]


def test_coefficients_and_match_reward():
    got, _ = rewards(positive=0.5, negative=2.0, match=0.25)
    assert got == [0.5, 0.5, -2, 0.25, -2, 0.5, 0.5]


def test_rank_divergence_tolerates_the_second_choice():
    got, index = rewards(divergence="rank", top_k=2)
    assert got == [1, 1, -1, 0, 0, 1, 1]
    assert rewards(divergence="rank", top_k=4) == ([1.0] * 7, [5, 2])
    assert index == [2, 2]


def test_margin_divergence_in_nats():
    assert rewards(divergence="margin", max_margin=1.0)[0] == [1, 1, -1, 0, 0, 1, 1]
    assert rewards(divergence="margin", max_margin=0.4)[0] == rewards()[0]
    assert rewards(divergence="margin", max_margin=2.0)[1] == [5, 2]


def test_length_normalisation_divides_by_each_responses_own_length():
    got, _ = rewards(normalize_length=True)
    assert got == pytest.approx([0.2, 0.2, -0.2, 0, -0.2, 0.5, 0.5])


def test_no_responses():
    empty = Stats(*(torch.empty(0, dtype=d) for d in (torch.int64,) * 2 + (torch.float32,) * 2))
    got, index = rewards_from_stats(
        empty, torch.empty(0, dtype=torch.int64), torch.tensor([0]), TokenRewardConfig()
    )
    assert got.shape == (0,) and index.shape == (0,)
