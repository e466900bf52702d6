"""Every fourth causal architecture of transformers, from number 0: see every_architecture.py."""

from __future__ import annotations

import pytest
from every_architecture import check, share


@pytest.mark.parametrize("model_type", share(0))
def test_equal_or_refused(model_type: str) -> None:
    check(model_type)
