"""Inputs that all the runs here share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runs_tiny import config, make_inputs, run


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


class WholeRuns(dict[str, Path]):
    """Stage -> a run of it that nothing interrupted, made when it is asked for."""

    def __init__(self, inputs: Path, root: Path) -> None:
        super().__init__()
        self.inputs, self.root = inputs, root

    def __missing__(self, stage: str) -> Path:
        output = self.root / stage
        run(stage, config(stage, self.inputs, output))
        self[stage] = output
        return output


@pytest.fixture(scope="session")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> WholeRuns:
    return WholeRuns(inputs, tmp_path_factory.mktemp("whole"))
