"""Two ZeRO ranks, killed and resumed, to the bit; one rank goes on with what two have written."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer" / "checkpoint"))
from runs_tiny import assert_same_run, make_inputs

from s2srm.checkpoint import files

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WORKER = Path(__file__).with_name("resume_worker.py")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def start(num_ranks: int, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), str(WORKER), *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """torchrun, and its ranks, which are in sessions of their own and would outlive it."""
    ranks: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, ranks)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        kill(process)
    assert process.returncode == 0, output[-6000:]
    return output


@pytest.mark.parametrize("stage, num_kills", [("rm", 2), ("ppo", 1)])
def test_killed_ranks_go_on_to_the_bit(
    stage: str, num_kills: int, inputs: Path, tmp_path: Path
) -> None:
    """ZeRO-3 with nothing kept whole."""
    started = time.monotonic()
    finish(start(2, stage, inputs, tmp_path / "whole", 3, "float32"))
    whole_life = time.monotonic() - started
    draw = random.Random(stage)
    for _ in range(num_kills):
        process = start(2, stage, inputs, tmp_path / "cut", 3, "float32")
        ends = time.monotonic() + whole_life
        checkpoints = files.checkpoints_of(tmp_path / "cut")
        before = set(checkpoints.glob("step-*"))
        # Some moment after something was saved, often while the next one is.
        while set(checkpoints.glob("step-*")) == before and time.monotonic() < ends:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 1.0))
        kill(process)
    finish(start(2, stage, inputs, tmp_path / "cut", 3, "float32"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_every_zero_stage_goes_on_to_the_bit(inputs: Path, tmp_path: Path) -> None:
    finish(start(2, "variants", inputs, tmp_path))
    wholes = sorted(tmp_path.glob("*-whole"))
    assert len(wholes) == 9
    for whole in wholes:
        assert_same_run(whole, whole.with_name(whole.name.replace("-whole", "-cut")))


def whole_tensors(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """(kind, name) -> all ranks' pieces, put together."""
    pieces: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        for key, tensor in load_file(path).items():
            kind, first, name = key.split("/", 2)
            pieces.setdefault((kind, name), []).append((int(first), tensor))
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for key, found in pieces.items():
        parts = [tensor for _, tensor in sorted(found, key=lambda piece: piece[0])]
        whole[key] = parts[0] if key[0] == "step" else torch.cat(parts)
    return whole


def test_two_ranks_one_rank_two_ranks(inputs: Path, tmp_path: Path) -> None:
    """Another number of ranks takes over weights and optimiser to the bit, and goes on."""
    out = tmp_path / "run"
    finish(start(2, "rm", inputs, out, 3, "float32", 2))
    checkpoint = files.checkpoint_path(out, 2)
    wanted = whole_tensors(checkpoint)
    assert {kind for kind, _ in wanted} == {"weight", "step", "exp_avg", "exp_avg_sq"}
    for ranks, engine in ((1, "torch"), (2, 3)):
        finish(start(ranks, "rm", inputs, out, engine, "float32", "resave"))
        assert json.loads((checkpoint / files.STATE).read_text())["world_size"] == ranks
        found = whole_tensors(checkpoint)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    finish(start(1, "rm", inputs, out, "torch", "float32", 3))
    finish(start(2, "rm", inputs, out, 3, "float32"))
    last = whole_tensors(files.checkpoint_path(out, 5))
    assert {float(tensor) for (kind, _), tensor in last.items() if kind == "step"} == {5.0}
