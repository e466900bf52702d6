"""Inputs that all the runs here share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runs_tiny import STAGES, config, make_inputs, run


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stage -> a run of it that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole")
    for stage in STAGES:
        run(stage, config(stage, inputs, root / stage))
    return {stage: root / stage for stage in STAGES}
