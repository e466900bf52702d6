"""Tests that need a GPU; without one each says so. `make gpu` runs them on a machine that has one.

S2SRM_GPU_TESTS_ON=cpu runs them on the CPU's backends instead: to try the tests themselves.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

ON_CPU = os.environ.get("S2SRM_GPU_TESTS_ON") == "cpu"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or ON_CPU:
        return
    here = Path(__file__).parent
    reason = f"needs a GPU: torch {torch.__version__} sees none"
    for item in items:
        if here in Path(item.fspath).parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device():
    return torch.device("cpu" if ON_CPU else "cuda")


@pytest.fixture(autouse=True)
def poisoned(device):
    """What torch.empty gives next holds NaN, so that an element that no kernel writes shows."""
    if device.type == "cuda":
        blocks = [torch.full((size,), torch.nan, device=device) for size in (2**24, 2**20, 2**12)]
        del blocks
