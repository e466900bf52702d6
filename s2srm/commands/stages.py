"""The training commands: one table, and what running any of them takes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2srm.commands.parsing import parse
from s2srm.config import PPOConfig, RMConfig, ScalarRMConfig, SFTConfig, StageConfig
from s2srm.validation import validate

if TYPE_CHECKING:
    from s2srm.runs import RunResult


@dataclass(frozen=True)
class Stage:
    """A training command: its settings, and the module whose `run(cfg)` trains."""

    config: type[StageConfig]
    module: str
    summary: str
    """What `s2srm --help` says of it, and `s2srm NAME --help` at its top."""

    def run(self, cfg: StageConfig) -> RunResult:
        """Train; imports what that takes."""
        return importlib.import_module(self.module).run(cfg)


STAGES: dict[str, Stage] = {
    "sft": Stage(
        SFTConfig,
        "s2srm.supervised.sft",
        "supervised fine-tuning on demonstrations, or on the chosen responses of triples",
    ),
    "rm": Stage(
        RMConfig,
        "s2srm.supervised.rm",
        "train a sequence-to-sequence reward model on preference triples",
    ),
    "scalar-rm": Stage(
        ScalarRMConfig,
        "s2srm.supervised.scalar_rm",
        "train a scalar (Bradley-Terry) reward model on the same triples",
    ),
    "ppo": Stage(
        PPOConfig,
        "s2srm.ppo.train",
        "PPO on the reward of either model, with critic and frozen reference",
    ),
}


def run_stage(name: str, argv: Sequence[str]) -> None:
    """Parse and check the arguments, run the stage, say where the model is."""
    stage = STAGES[name]
    summary = f"{stage.summary[0].upper()}{stage.summary[1:]}."
    cfg = validate(parse(stage.config, argv, name, summary))
    from s2srm import distributed
    from s2srm.commands.libraries import quiet_libraries

    quiet_libraries()
    result = stage.run(cfg)
    if distributed.is_main():
        for metric, value in sorted(result.metrics.items()):
            print(f"{metric:<34} {value:.6g}")
        print(f"run: {result.output}")
