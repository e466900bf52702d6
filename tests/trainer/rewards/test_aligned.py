"""Rewards by minimum edit distance between response and correction."""

import pytest

from s2srm.config import TokenRewardConfig
from s2srm.rewards.aligned import aligned_rewards, kept_tokens

EOS = 2


@pytest.mark.parametrize(
    ("response", "correction", "kept"),
    [
        ([5, 6, EOS], [5, 6, EOS], [1, 1, 1]),
        ([5, 6, EOS], [5, 9, EOS], [1, 0, 1]),  # substituted
        ([5, 6, 7, EOS], [5, 7, EOS], [1, 0, 1, 1]),  # deleted
        ([5, 7, EOS], [5, 6, 7, EOS], [1, 0, 1]),  # inserted: marks the token after the gap
        ([5, 6], [8, 5, 6], [0, 1]),  # inserted at the beginning
        ([5, 6, EOS], [5, 6, 7, EOS], [1, 1, 0]),  # too early an end: EOS is marked
        ([5, 6], [5, 6, 7, EOS], [1, 0]),  # inserted at the end of a truncated response
        ([EOS], [5, 6, EOS], [0]),  # empty response
        ([5, 6, 7, EOS], [EOS], [0, 0, 0, 1]),  # empty correction
        ([5, 6], [7, 8], [0, 0]),
        ([5, 5, 5], [5], None),  # two deleted, whichever
    ],
)
def test_labels(response, correction, kept):
    got = kept_tokens(response, correction)
    if kept is None:
        assert sum(got) == 1
    else:
        assert got == [bool(k) for k in kept]


def test_rewards_and_divergence_index_of_several_responses():
    cfg = TokenRewardConfig(mode="aligned", positive=0.5, negative=2.0)
    rewards, index = aligned_rewards(
        [[5, 6, EOS], [7, EOS], [7, 8]], [[5, 9, EOS], [7, EOS], [7, 8]], cfg
    )
    assert rewards.tolist() == [0.5, -2.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert index.tolist() == [1, 2, 2]


def test_kept_tokens_after_the_divergence_are_paid_unlike_teacher_forced_ones():
    cfg = TokenRewardConfig(mode="aligned", match=-7.0)
    rewards, _ = aligned_rewards([[5, 6, 7, EOS]], [[5, 9, 7, EOS]], cfg)
    assert rewards.tolist() == [1, -1, 1, 1]


def test_length_normalisation():
    cfg = TokenRewardConfig(mode="aligned", normalize_length=True)
    rewards, _ = aligned_rewards([[5, 6], [7, 8, 9, EOS]], [[5, 6], [7, 8, 9, EOS]], cfg)
    assert rewards.tolist() == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25]


def test_no_responses():
    rewards, index = aligned_rewards([], [], TokenRewardConfig())
    assert rewards.shape == (0,) and index.shape == (0,)
