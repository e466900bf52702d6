"""A flipped, missing or surplus byte in any file is found, and the checkpoint before is taken."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from runs_tiny import assert_same_run, config, interrupted, run

from s2srm.checkpoint import files
from s2srm.errors import UserError

NAMES = ("model-00000-of-00001.safetensors", files.STATE, files.MANIFEST)


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first byte flipped": lambda path: flip(path, 0.0),
    "byte flipped": flip,
    "last byte flipped": lambda path: flip(path, 1.0),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"\n "),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def stopped(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 3 that has two more to go."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    interrupted("sft", config("sft", inputs, output), after=3)
    return output


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found(damage: str, name: str, stopped: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000003"
    shutil.copytree(files.checkpoint_path(stopped, 3), checkpoint)
    assert files.find_damage(checkpoint) is None
    DAMAGES[damage](checkpoint / name)
    found = files.find_damage(checkpoint)
    assert found is not None and name in found


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoint_before_is_taken(
    name: str,
    stopped: Path,
    whole: dict[str, Path],
    inputs: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    flip(files.checkpoint_path(output, 3) / name)
    with caplog.at_level(logging.INFO):
        run("sft", config("sft", inputs, output, resume="auto"))
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any(name in line and "step-00000003" in line for line in warnings), warnings
    assert "step-00000002" in caplog.text
    assert_same_run(whole["sft"], output)
    assert [p.name for p in files.list_damaged(output)] == ["damaged-step-00000003"]


def test_nothing_starts_anew_where_all_are_damaged(
    stopped: Path, inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    for checkpoint in files.list_checkpoints(output):
        flip(checkpoint / files.STATE)
    before = (output / "metrics.jsonl").read_bytes()
    cfg = config("sft", inputs, output, resume="auto")
    for _ in range(2):
        with pytest.raises(UserError, match="damaged and no other checkpoint is left") as caught:
            run("sft", cfg)
        assert "\n" not in str(caught.value)
    assert (output / "metrics.jsonl").read_bytes() == before


def test_a_named_checkpoint_is_not_replaced_by_another(
    stopped: Path, inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    newest = files.checkpoint_path(output, 3)
    flip(newest / NAMES[0])
    cfg = config("sft", inputs, tmp_path / "other", resume=str(newest))
    with pytest.raises(UserError, match=r"step-00000003 is damaged"):
        run("sft", cfg)
    assert newest.exists() and not (tmp_path / "other").exists()
    run("sft", replace(cfg, resume=str(output)))  # of the run, the one before will do
    assert newest.exists(), "another run's folder is only read"
