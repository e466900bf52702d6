"""`s2srm rm`."""

from __future__ import annotations

from collections.abc import Sequence

from s2srm.commands.stage import run_stage
from s2srm.config import RMConfig

SUMMARY = "Train a sequence-to-sequence reward model: correction and identity mapping."


def run(argv: Sequence[str]) -> None:
    """Parse the arguments and run the stage."""
    run_stage("rm", RMConfig, argv, SUMMARY)
