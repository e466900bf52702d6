"""benchmarks/ is a folder of the repository and no installed package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture
def cpu():
    return torch.device("cpu")
