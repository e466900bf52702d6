"""SIGKILL at random moments and operations on files: the result is the same to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs_tiny import assert_same_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", ["rm", "ppo"])
def test_killed_runs_end_as_a_whole_one(stage: str, inputs: Path, tmp_path: Path) -> None:
    worker = Path(__file__).with_name("kill_worker.py")
    process = subprocess.Popen(
        [sys.executable, str(worker), stage, str(inputs), str(tmp_path), "7", "10"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-6000:]
    killed = sorted(tmp_path.glob("killed-*"))
    assert killed
    for folder in killed:
        assert_same_run(tmp_path / "whole", folder)
