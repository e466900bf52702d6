"""`s2srm sft`."""

from __future__ import annotations

from collections.abc import Sequence

from s2srm.commands.stage import run_stage
from s2srm.config import SFTConfig

SUMMARY = (
    "Supervised fine-tuning on demonstrations, or on the chosen responses of preference triples."
)


def run(argv: Sequence[str]) -> None:
    """Parse the arguments and run the stage."""
    run_stage("sft", SFTConfig, argv, SUMMARY)
