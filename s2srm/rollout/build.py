"""Which rollout engine generates for a model that is in training: the one place that names one."""

from __future__ import annotations

from transformers import PreTrainedModel

from s2srm.rollout.base import RolloutEngine
from s2srm.rollout.hf import HFRollout


def build_rollout(lm: PreTrainedModel) -> RolloutEngine:
    """An engine of the model's architecture, without weights until `update_weights`."""
    return HFRollout.without_weights(lm)
