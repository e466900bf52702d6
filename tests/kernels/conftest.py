"""Runs the tests that ask for `backend` once with every backend that a CPU can run."""

import os
import shutil

import pytest

from s2srm_kernels import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["triton"] if INTERPRETED else ["reference", "cpp"])
def backend(request, monkeypatch):
    """What impl="auto" takes on the CPU for the length of a test."""
    if request.param == "cpp" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler: the cpp backend cannot be built")
    if request.param != "reference":
        assert dispatch.load(request.param) is None
    monkeypatch.setattr(dispatch, "_AUTO_ORDER_ELSEWHERE", (request.param, "reference"))
    monkeypatch.setattr(dispatch, "_AUTO_CHOICES", {})  # what was chosen before, with its order
    return request.param
