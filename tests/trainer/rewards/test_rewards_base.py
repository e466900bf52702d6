"""What every reward goes through: missing-EOS penalty, scale, clip; and the row bookkeeping."""

import torch

from s2srm.config import RewardConfig
from s2srm.rewards.base import cumulative_lengths, sequence_sums, shape_rewards
from s2srm.rollout.base import Response

RESPONSES = [Response([5, 2], True), Response([5, 6, 7], False), Response([2], True)]


def test_penalty_in_raw_units_then_scale_then_clip():
    raw = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, 3.0])
    cfg = RewardConfig(missing_eos_penalty=2.0, clip=1.2)
    rewards, raw_sum, total = shape_rewards(raw, RESPONSES, cfg, 0.5)
    assert rewards.tolist() == [0.5, 0.5, 0.5, -0.5, -0.5, 1.2000000476837158]
    assert raw_sum.tolist() == [2.0, -1.0, 3.0]
    assert total.tolist() == [1.0, -0.5, 1.2000000476837158]
    assert raw.tolist() == [1, 1, 1, -1, 1, 3], "the input stays as it is"


def test_penalty_only_without_eos_and_only_at_the_last_token():
    cfg = RewardConfig(missing_eos_penalty=1.0)
    rewards, _, _ = shape_rewards(torch.zeros(6), RESPONSES, cfg, 1.0)
    assert rewards.tolist() == [0, 0, 0, 0, -1, 0]


def test_no_clip_when_it_is_zero():
    rewards, _, _ = shape_rewards(torch.full((6,), 50.0), RESPONSES, RewardConfig(), 1.0)
    assert rewards.tolist() == [50.0] * 6


def test_rows_and_sums():
    cu_rows = cumulative_lengths(RESPONSES)
    assert cu_rows.tolist() == [0, 2, 5, 6] and cu_rows.dtype == torch.int32
    assert sequence_sums(torch.arange(6.0), cu_rows).tolist() == [1.0, 9.0, 5.0]
    assert cumulative_lengths([]).tolist() == [0]
    assert sequence_sums(torch.empty(0), cumulative_lengths([])).shape == (0,)
