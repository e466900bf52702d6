"""Sizes and hyper-parameters of the demo, one set per miniature world. No torch here.

Both PPO runs of a world share every value, the KL coefficient in units of one standard deviation of
the sequence reward included. They were chosen on prompts of the dev splits (benchmarks/LOG.md),
most of them in the summarisation world alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import get_args

from s2srm.evaluation.config import WorldName


@dataclass(frozen=True)
class DemoSettings:
    """Every number that the demo's stages get."""

    demonstrations: int = 16000
    """Rows of sft.jsonl."""
    preferences: int = 10000
    """Triples, the same for both reward models."""
    dev_rows: int = 256
    """Held-out triples, on which both reward models are measured."""
    prompts: int = 4000
    """Prompts of PPO."""
    sft_steps: int = 600
    """Optimiser steps of SFT."""
    sft_lr: float = 2e-3
    """Peak learning rate of SFT, which starts from random weights."""
    rm_steps: int = 350
    """Optimiser steps of the seq2seq RM, which starts from the SFT model."""
    rm_lr: float = 1.5e-3
    """Peak learning rate of the seq2seq RM."""
    identity_weight: float = 0.3
    """Weight of the identity mapping."""
    scalar_rm_steps: int = 200
    """Optimiser steps of the scalar RM, which starts from the SFT model."""
    scalar_rm_lr: float = 5e-4
    """Peak learning rate of the scalar RM."""
    batch_size: int = 32
    """Rows per optimiser step of the supervised stages."""
    ppo_phases: int = 24
    """Rollout phases of each PPO run."""
    rollout_size: int = 128
    """Responses per phase."""
    minibatch_size: int = 32
    """Responses per optimiser step of PPO."""
    ppo_epochs: int = 3
    """Passes over a phase's responses."""
    ppo_lr: float = 3e-4
    """Peak learning rate of the policy."""
    critic_lr: float = 1e-3
    """Peak learning rate of the critic."""
    critic_clip: float = 0.2
    """Clip range of the critic's values."""
    adam_eps: float = 1e-5
    """AdamW's epsilon in every stage."""
    kl_coef: float = 0.1
    """beta, in reward standard deviations per nat."""
    max_new_tokens: int = 48
    """Longest response."""
    eval_prompts: int = 256
    """Prompts of each of the test and ood splits."""
    eval_samples: int = 1
    """Responses per prompt at temperature 1."""

    def scaled(self, scale: float) -> DemoSettings:
        """Counts of rows, steps and prompts times `scale`, each at least large enough to run."""
        floors = {
            "demonstrations": 64,
            "preferences": 64,
            "dev_rows": 16,
            "prompts": 64,
            "sft_steps": 2,
            "rm_steps": 2,
            "scalar_rm_steps": 2,
            "ppo_phases": 2,
            "eval_prompts": 8,
        }
        return dataclasses.replace(
            self,
            **{
                name: max(floor, round(getattr(self, name) * scale))
                for name, floor in floors.items()
            },
        )


_OWN: dict[WorldName, DemoSettings] = {
    # With more identity mapping this RM copies padding, which is then rewarded; with as little, the
    # safety world's RM replaces refusals that should stay.
    "summarization": DemoSettings(identity_weight=0.03),
}
SETTINGS: dict[WorldName, DemoSettings] = {
    world: _OWN.get(world, DemoSettings()) for world in get_args(WorldName)
}
"""The worlds in the order of `--all`."""
