"""One process and two ZeRO ranks: the same losses, gradients, metrics and saved weights."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from cases import CASES, make_inputs, run_all
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2srm.data.templates import Template

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5
STAGE_CASES = [name for name in CASES if name != "several-engines"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs of every case in data/."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "data").mkdir()
    make_inputs(root / "data")
    return root


@pytest.fixture(scope="module")
def launched(root: Path) -> tuple[int, str]:
    """Exit code and output of the two ranks, which write into two/."""
    return launch(root / "two", root / "data")


@pytest.fixture(scope="module")
def folders(root: Path, launched: tuple[int, str]) -> tuple[Path, Path, Path]:
    """Inputs, what one process made of them, what two ranks made of them.

    Ranks that failed are the failure of one test, below; a case that they finished is compared.
    """
    run_all(root / "data", root / "one")
    return root / "data", root / "one", root / "two"


def launch(out: Path, data: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(Path(__file__).with_name("cases.py"))]
    process = subprocess.Popen(
        [*command, str(data), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    timer = threading.Timer(180, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
        output, _ = process.communicate()
    finally:
        timer.cancel()
        # Ranks that wait for each other would outlive torchrun.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def test_both_ranks_run_to_the_end(launched: tuple[int, str]) -> None:
    code, output = launched
    assert code == 0, output[-6000:]


BALANCE = "balance/tokens_max_over_mean"


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "model.safetensors")
    if (folder / "score_head.safetensors").exists():
        found |= {f"score.{k}": v for k, v in load_file(folder / "score_head.safetensors").items()}
    return found


@pytest.mark.parametrize("name", STAGE_CASES)
def test_metrics_are_the_same(name: str, folders: tuple[Path, Path, Path]) -> None:
    one, two = metrics(folders[1] / name), metrics(folders[2] / name)
    assert len(one) == len(two) >= 2
    for a, b in zip(one, two, strict=True):
        assert set(a) == set(b)
        assert a["step"] == 0 or 1.0 == a[BALANCE] <= b[BALANCE] <= 2.0
        for key in set(a) - {"time", BALANCE}:
            assert b[key] == pytest.approx(a[key], rel=TOLERANCE, abs=1e-7), (a["step"], key)


@pytest.mark.parametrize("name", STAGE_CASES)
def test_updated_weights_are_the_same(name: str, folders: tuple[Path, Path, Path]) -> None:
    one, two = weights(folders[1] / name), weights(folders[2] / name)
    assert set(one) == set(two)
    start = load_file(_start_of(folders[0], one) / "model.safetensors")
    moved = 0.0
    for key, wanted in one.items():
        # A scalar RM's bias has no gradient but for rounding: a pair's difference leaves it out.
        scale = max(float(wanted.abs().max()), 1e-3)
        assert float((two[key] - wanted).abs().max()) <= TOLERANCE * scale, key
        if key in start:
            moved = max(moved, float((wanted - start[key]).abs().max()))
    assert moved > 1e-4, "the weights have not moved: nothing was compared"


def _start_of(data: Path, saved: Mapping[str, torch.Tensor]) -> Path:
    if any(key.startswith("transformer.") for key in saved):
        return data / "bloom"
    family = "gemma3" if any("q_norm" in key for key in saved) else "llama"
    return data / (family if "lm_head.weight" in saved else f"{family}-tied")


def test_gradients_are_larger_than_deepspeed_would_let_them_be(
    folders: tuple[Path, Path, Path],
) -> None:
    """DeepSpeed clips at norm 1 when it is not told anything: here that would have shown."""
    assert metrics(folders[2] / "rm-gradient-tied")[1]["grad_norm"] > 1.5
    assert metrics(folders[2] / "rm-mixed-untied")[1]["grad_norm"] > 1.5


def test_several_engines_in_one_process(folders: tuple[Path, Path, Path]) -> None:
    one, two = (
        json.loads((folder / "several-engines" / "found.json").read_text())
        for folder in folders[1:]
    )
    for key, values in one.items():
        assert two[key] == pytest.approx(values, rel=TOLERANCE), key
    assert len(set(one["reference"])) == 1, "the frozen model has moved"
    assert len(set(one["policy"])) == len(one["policy"])


@pytest.mark.parametrize("name", ["rm-skewed-tied", "rm-mixed-untied", "scalar-mixed-untied"])
def test_two_ranks_save_a_whole_model(name: str, folders: tuple[Path, Path, Path]) -> None:
    folder = folders[2] / name
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 2
    assert Template.load(folder).eos_id == 2
    logits = model(torch.tensor([[3, 4, 5]])).logits
    assert logits.shape == (1, 3, 61) and bool(logits.isfinite().all())
