"""What every test may rely on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the last of them would keep one of two processes waiting."""
    marks = ("slow", "distributed")
    slow = {item.path for item in items if any(item.get_closest_marker(mark) for mark in marks)}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="module")
def no_process_group_outlives_its_module() -> Iterator[None]:
    """One process runs many modules, and a group that is open decides what its rank is."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
