"""What docs/settings.md says of critic.clip is what the measurement gives."""

from __future__ import annotations

from benchmarks.defaults import critic_means
from s2srm.config import CriticConfig


def test_a_clip_range_slows_a_critic_that_is_far_from_its_returns():
    clipped, scaled = critic_means(0.2, lr=3e-3), critic_means(0.2, of_std=True, lr=3e-3)
    free = critic_means(CriticConfig().clip, lr=3e-3)
    assert free[0] < 1.5 * clipped[0] and free[0] < 1.5 * scaled[0], "the first phase"
    assert free[3] < -8.88 < clipped[-1], "one arrives, the other does not"
