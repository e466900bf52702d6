"""KL between policy and reference, estimated at the sampled tokens, and its coefficient.

    k1 = log pi(y) - log ref(y)              unbiased; what is subtracted from the reward
    k3 = ref(y)/pi(y) - 1 - log(ref(y)/pi(y))  unbiased, never negative, lower variance; logged

(J. Schulman, "Approximating KL divergence".) The adaptive controller is that of Ziegler et al.,
arXiv 1909.08593, with the error clipped at 1 where they clip at 0.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from s2srm.bounds import check_bounds
from s2srm.config import KLConfig


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(N,) nats, of either sign; the mean over samples of the policy is the KL."""
    return logprobs - ref_logprobs


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(N,) float64 nats, at least 0; float32 would overflow at a gap of 88 nats, this at 709."""
    log_ratio = (ref_logprobs - logprobs).double()
    # expm1(x) - x can come out as -1e-12 for tiny x by rounding alone.
    return (torch.expm1(log_ratio) - log_ratio).clamp_min(0.0)


class KLController:
    """beta, fixed or adaptive:

    beta <- beta * exp(clip(kl / target - 1, -1, 1) * num_responses / horizon)
    """

    def __init__(self, cfg: KLConfig) -> None:
        check_bounds(cfg, "kl")
        self.cfg = cfg
        self.coef = cfg.coef

    def update(self, kl_per_response: float, num_responses: int) -> None:
        """After a phase: the mean over all ranks' responses of the sum of k1, in nats."""
        if self.cfg.controller == "fixed":
            return
        error = min(max(kl_per_response / self.cfg.target - 1.0, -1.0), 1.0)
        self.coef *= math.exp(error * num_responses / self.cfg.horizon)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.coef = float(state["coef"])
