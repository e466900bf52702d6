"""`s2srm ppo`."""

from __future__ import annotations

from collections.abc import Sequence

from s2srm.commands.stage import run_stage
from s2srm.config import PPOConfig

SUMMARY = "PPO on the per-token rewards of an RM, with critic and frozen reference."


def run(argv: Sequence[str]) -> None:
    """Parse the arguments and run the stage."""
    run_stage("ppo", PPOConfig, argv, SUMMARY)
