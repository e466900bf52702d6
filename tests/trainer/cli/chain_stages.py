"""A stage for test_side_by_side.py, which its processes import: it does what `output` says."""

from __future__ import annotations

import time
from pathlib import Path

from s2srm.config import StageConfig
from s2srm.errors import UserError
from s2srm.runs import RunResult


def run(cfg: StageConfig) -> RunResult:
    """`fail`: bad input; `wait`: until it is ended; else touch the file."""
    if cfg.output == "fail":
        raise UserError("data.path: nothing there")
    if cfg.output == "wait":
        time.sleep(60)
        raise AssertionError("nobody ended the wait")
    Path(cfg.output).touch()
    return RunResult(Path(cfg.output), {"eval/loss": 0.5, "loss": 0.1})
