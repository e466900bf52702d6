"""bfloat16 over two ranks, ZeRO 0 to 3: one process's float32 step, as far as bfloat16 goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bf16_cases import CASES, run_all
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
NAMES = ["-".join(case) for case in CASES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process made of the cases in float32, and what two ranks made in bfloat16."""
    root = tmp_path_factory.mktemp("bf16")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).with_name("bf16_cases.py")
    # The ranks find tiny_models where pytest does.
    environment = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    result = subprocess.run(
        [sys.executable, *launcher, str(script), str(root / "two")],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | environment,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert result.stdout == "", "DeepSpeed prints"
    run_all(root / "one", torch.float32)
    return root / "one", root / "two"


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_norms_agree(name: str, folders: tuple[Path, Path]) -> None:
    """In float32: without the small micro-batches 3% of the seq2seq RM's would be gone."""
    one, two = (json.loads((folder / "found.json").read_text())[name] for folder in folders)
    bound = 0.01 if "seq2seq-rm" in name else 0.04
    assert two["loss"] == pytest.approx(one["loss"], rel=bound)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=bound)


@pytest.mark.parametrize("name", NAMES)
def test_updates_agree(name: str, folders: tuple[Path, Path]) -> None:
    """The step is so long that the weights after it are the gradient."""
    one, two = (load_file(folder / f"{name}.safetensors") for folder in folders)
    assert set(one) == set(two)
    error = sum(float((two[key] - wanted).square().sum()) for key, wanted in one.items())
    assert error**0.5 <= 0.06 * sum(float(w.square().sum()) for w in one.values()) ** 0.5
