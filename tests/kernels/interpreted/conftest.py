"""These tests are collected only under TRITON_INTERPRET=1, set before triton is imported.

tests/kernels/test_interpreter.py runs them so, in processes of their own. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted
"""

import os

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """torch.empty gives NaN: an element that no kernel writes shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
