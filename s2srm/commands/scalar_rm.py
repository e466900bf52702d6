"""`s2srm scalar-rm`."""

from __future__ import annotations

from collections.abc import Sequence

from s2srm.commands.stage import run_stage
from s2srm.config import ScalarRMConfig

SUMMARY = "Train a scalar (Bradley-Terry) reward model."


def run(argv: Sequence[str]) -> None:
    """Parse the arguments and run the stage."""
    run_stage("scalar-rm", ScalarRMConfig, argv, SUMMARY)
