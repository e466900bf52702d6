"""Every shipped recipe on two ZeRO-3 ranks in bfloat16: starts, trains, saves, goes on to the bit.

So does a model of another family, Gemma 3 with a vocabulary of 262144, with no change to anything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from recipes_worker import KEPT_WHOLE, ORDER, RECIPES_OF, make_inputs
from runs_tiny import assert_same_run

from s2srm.commands.parsing import recipe_names

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WORKER = Path(__file__).with_name("recipes_worker.py")
CASES = [(model, stage) for model in KEPT_WHOLE for stage in ORDER]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/whole/MODEL/STAGE, and ROOT/cut/MODEL/STAGE resumed by other processes."""
    folder = tmp_path_factory.mktemp("recipes")
    make_inputs(folder)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ("start", "resume"):
        result = subprocess.run(
            [sys.executable, *launcher, str(WORKER), command, str(folder)],
            capture_output=True,
            text=True,
            timeout=600,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return folder


def test_every_recipe_is_run():
    own = {f"{model}-{stage}" for model, stage in CASES if model not in RECIPES_OF}
    assert own == set(recipe_names())


@pytest.mark.parametrize("model, stage", CASES)
def test_recipe_trains_saves_and_goes_on(model: str, stage: str, root: Path) -> None:
    whole, cut = (root / name / model / stage for name in ("whole", "cut"))
    last = (whole / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 2
    assert json.loads((whole / "config.json").read_text())["model_type"] == FAMILIES[model]
    assert_same_run(whole, cut)


FAMILIES = {
    "gemma-2b": "gemma",
    "llama2-7b": "llama",
    "smollm2-135m": "llama",
    "tiny": "llama",
    "gemma3": "gemma3_text",
}
