"""One unit for every reward: the standard deviation of the sequence sum under the initial policy.

KL coefficients then mean the same for every reward model. The mean is left alone.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from s2srm.errors import UserError
from s2srm.rewards.base import RewardModel


class RewardScale:
    """The factor of a reward model: measured once, and kept by checkpoints."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model
        self.value = 1.0

    def set(self, value: float) -> None:
        """Multiply every later reward by `value`."""
        self.value = value
        self.model.calibrate(value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.set(float(state["value"]))


def unit_std_scale(raw_sum: Tensor) -> float:
    """1 / standard deviation of the sequence sums (divided by their number).

    Args:
        raw_sum: (B,) raw sequence sums of all calibration responses.

    Raises UserError if there are fewer than two in all, or if they are all the same.
    """
    sums = raw_sum.double()
    count = sums.numel()
    if count < 2:
        raise UserError(
            f"reward.scale unit_std needs at least 2 responses to measure a standard deviation, "
            f"got {count}; raise reward.calibration_prompts"
        )
    mean = float(sums.mean())
    std = math.sqrt(float(((sums - mean) ** 2).mean()))
    # Equal sums differ in the mean's last bits only.
    if not math.isfinite(std) or std <= 1e-7 * max(1.0, abs(mean)):
        raise UserError(
            f"reward.scale unit_std: all {count} responses of the initial policy got the reward "
            f"sum {mean:.6g}, so there is no unit to scale by; the reward model does not tell them "
            "apart (take reward.scale none, another reward model, or a higher temperature)"
        )
    return 1.0 / std
