"""Two ranks whose numbers stop being finite stop together, in one line that is the last one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import make_inputs

pytestmark = pytest.mark.distributed


def test_two_ranks_stop_together(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = {
        "model.path": tmp_path / "llama",
        "data.path": tmp_path / "mixed.jsonl",
        "output": tmp_path / "out",
        "template.kind": "plain",
        "template.separator": "w3 w4",
        "optim.lr": "1e30",
        "max_steps": 4,
        "batch_size": 4,
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    result = subprocess.run(
        [sys.executable, *launcher, "-m", "s2srm", "rm", *flags],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode != 0
    last = result.stderr.splitlines()[-1]
    assert last.startswith("s2srm: error: seq2seq RM step 2: the "), result.stderr[-3000:]
    assert "lower optim.lr (1e+30)" in last
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["loss"] > 0 and None in json.loads(rows[-1]).values()
    assert not list((tmp_path / "out").glob("*.safetensors"))
