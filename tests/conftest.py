"""What every test may rely on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True, scope="module")
def no_process_group_outlives_its_module() -> Iterator[None]:
    """One process runs many modules, and a group that is open decides what its rank is."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
