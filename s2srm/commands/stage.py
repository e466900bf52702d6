"""What the training commands share: parse, check, run the stage, say where the model is."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from s2srm.commands.parsing import parse
from s2srm.config import StageConfig
from s2srm.validation import validate


def run_stage(name: str, cls: type[StageConfig], argv: Sequence[str], summary: str) -> None:
    """Run `s2srm.stages.<name>` with the config that the arguments make."""
    cfg = validate(parse(cls, argv, name, summary))
    from s2srm import distributed
    from s2srm.commands.libraries import quiet_libraries

    quiet_libraries()
    stage = importlib.import_module(f"s2srm.stages.{name.replace('-', '_')}")
    result = stage.run(cfg)
    if distributed.is_main():
        for metric, value in sorted(result.metrics.items()):
            print(f"{metric:<34} {value:.6g}")
        print(f"run: {result.output}")
