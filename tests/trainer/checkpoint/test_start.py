"""Where a run starts, and what it refuses to go on from: one line that names the key."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs_tiny import ADAMW, assert_same_run, config, interrupted, rows_without_times, run

from s2srm.checkpoint import files
from s2srm.config import DataConfig, EngineConfig, LogConfig, StageConfig
from s2srm.errors import UserError
from s2srm.runs import FINISHED
from s2srm.validation import validate

CONSTANT = replace(ADAMW, schedule="constant", warmup_steps=0)


@pytest.fixture(scope="module")
def stopped(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps that was killed after the third."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    interrupted("sft", config("sft", inputs, output), after=3)
    return output


def test_auto_starts_where_there_is_nothing(
    whole: dict[str, Path], inputs: Path, tmp_path: Path
) -> None:
    run("sft", config("sft", inputs, tmp_path / "run", resume="auto"))
    assert_same_run(whole["sft"], tmp_path / "run")


def test_auto_starts_again_what_was_killed_before_its_first_checkpoint(
    inputs: Path, tmp_path: Path
) -> None:
    cfg = config("sft", inputs, tmp_path / "run", save_every=3, resume="auto")
    interrupted("sft", cfg, after=2)
    files.make_temporary(tmp_path / "run", 3)
    run("sft", cfg)
    run("sft", config("sft", inputs, tmp_path / "whole", save_every=3))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_run_without_checkpoints_is_not_thrown_away(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run("sft", config("sft", inputs, output, save_every=0))
    (output / FINISHED).unlink()  # as if killed after the model was saved
    with pytest.raises(UserError, match="already holds a run"):
        run("sft", config("sft", inputs, output, resume="auto"))
    assert (output / "model.safetensors").exists()


def test_a_finished_run_is_left_as_it_is(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config("sft", inputs, tmp_path / "run", resume="auto")
    result = run("sft", cfg)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with caplog.at_level(logging.INFO):
        assert run("sft", cfg) == result
    assert "has finished: nothing to do" in caplog.text
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 1}, "seed is 1, the run in"),
    "nested": ({"optim": replace(ADAMW, lr=0.5)}, r"optim\.lr is 0\.5"),
    "batch": ({"batch_size": 2}, "batch_size is 2"),
    "longer": ({"max_steps": 9}, r"max_steps is 9.*optim\.schedule cosine.*constant"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_shape_the_result_must_agree(
    name: str, stopped: Path, inputs: Path, tmp_path: Path
) -> None:
    changes, message = CHANGES[name]
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    with pytest.raises(UserError, match=message) as caught:
        run("sft", config("sft", inputs, output, resume="auto", **changes))
    assert "\n" not in str(caught.value)
    assert files.list_checkpoints(output) != []


def test_another_stage_is_refused(stopped: Path, inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is of a SFTConfig, this run has a RMConfig"):
        run("rm", config("rm", inputs, tmp_path / "run", resume=str(stopped)))


def test_other_rows_and_other_weights_are_refused(inputs: Path, tmp_path: Path) -> None:
    root = tmp_path / "inputs"
    shutil.copytree(inputs, root)
    cfg = config("sft", root, tmp_path / "run", resume="auto", save_every=2)
    interrupted("sft", cfg, after=2)
    weights = root / "policy" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.path: the weights there are not those"):
        run("sft", cfg)
    weights.write_bytes(good)
    lines = (root / "rows.jsonl").read_text().splitlines(keepends=True)
    (root / "rows.jsonl").write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(UserError, match=r"trained on other rows: data\.path"):
        run("sft", cfg)


def test_what_changes_nothing_may_change(
    stopped: Path, inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "moved"
    shutil.copytree(stopped, output)
    cfg = config(
        "sft",
        inputs,
        output,
        resume="auto",
        save_every=2,
        keep_checkpoints=1,
        log=LogConfig(every=1),
        microbatch_tokens=64,
        engine=EngineConfig("torch"),
    )
    with caplog.at_level(logging.INFO):
        run("sft", cfg)
    assert "but for" in caplog.text and "microbatch_tokens 4096 -> 64" in caplog.text
    assert [files.step_of(p) for p in files.list_checkpoints(output)] == [5]


def test_a_constant_schedule_can_be_made_longer(inputs: Path, tmp_path: Path) -> None:
    def cfg(out: str, steps: int, **more: Any) -> StageConfig:
        return config("sft", inputs, tmp_path / out, max_steps=steps, optim=CONSTANT, **more)

    run("sft", cfg("whole", 5, eval_data=None))
    run("sft", cfg("run", 3, eval_data=None))
    run("sft", cfg("run", 5, eval_data=None, resume="auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    with pytest.raises(UserError, match="has done 5 steps, the run is to have 4"):
        run("sft", cfg("run", 4, eval_data=None, resume="auto"))


def test_another_folder_goes_on_with_the_history(
    stopped: Path, whole: dict[str, Path], inputs: Path, tmp_path: Path
) -> None:
    named = files.checkpoint_path(stopped, 2)
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    for name, source in (("run", stopped), ("checkpoint", named)):
        run("sft", config("sft", inputs, tmp_path / name, resume=str(source)))
        assert_same_run(whole["sft"], tmp_path / name)
    assert before == {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}


def test_going_back_drops_what_came_after(
    stopped: Path, whole: dict[str, Path], inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    cfg = config("sft", inputs, output, resume=str(files.checkpoint_path(output, 2)))
    run("sft", cfg)
    assert_same_run(whole["sft"], output)


def test_a_folder_without_checkpoints_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint; give a run"):
        run("sft", config("sft", inputs, tmp_path / "run", resume=str(inputs)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"save_every": -1}, "save_every must be at least 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"resume": "atuo"}, "resume must be never, auto or the folder"),
        ({"resume": "auto", "overwrite": True}, "give one of them"),
    ],
)
def test_values_without_sense(
    changes: dict[str, Any], message: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        validate(config("sft", inputs, tmp_path / "run", **changes))


def test_the_log_of_a_resumed_run_has_every_step_once(
    stopped: Path, inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(stopped, output)
    data = DataConfig(str(inputs / "rows.jsonl"))
    assert data.limit is None
    run("sft", config("sft", inputs, output, resume="auto"))
    assert [row["step"] for row in rows_without_times(output)] == [0, 1, 2, 3, 4, 5]
    assert json.loads((output / FINISHED).read_text())["stage"] == "SFTConfig"
