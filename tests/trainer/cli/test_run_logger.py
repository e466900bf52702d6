"""metrics.jsonl and samples.jsonl hold what was logged, as valid JSON, whatever the numbers."""

from __future__ import annotations

import json
import logging
import math
import sys

import pytest

from s2srm.config import LogConfig
from s2srm.errors import TrainingDiverged, UserError
from s2srm.jsonl import read_jsonl
from s2srm.metrics import RunLogger


def test_rows_are_written_at_once_and_in_order(tmp_path):
    with RunLogger(tmp_path, LogConfig(), 2, "t") as log:
        log.row(1, {"loss": 2.0})
        assert read_jsonl(tmp_path / "metrics.jsonl")[0]["loss"] == 2.0
        log.row(2, {"loss": 1.0, "lr": 0.5})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["lr"] == 0.5 and rows[1]["time"] >= rows[0]["time"]
    assert log.last == {"loss": 1.0, "lr": 0.5}


def test_nan_becomes_null_with_one_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), RunLogger(tmp_path, LogConfig(), 3, "t") as log:
        for step in (1, 2, 3):
            log.row(step, {"loss": math.nan, "kl": math.inf, "lr": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert all(json.loads(line)["loss"] is None for line in text.splitlines())
    assert sorted(r.getMessage() for r in caplog.records) == [
        "kl is inf at step 1",
        "loss is nan at step 1",
    ]


def test_the_last_value_of_a_metric_is_the_last_one_also_where_it_is_nan(tmp_path):
    with RunLogger(tmp_path, LogConfig(), 2, "t") as log:
        log.row(1, {"loss": 0.5, "kl": 0.1})
        log.row(2, {"loss": math.nan})
    assert math.isnan(log.last["loss"]) and log.last["kl"] == 0.1


def test_the_step_that_diverged_is_the_last_row(tmp_path):
    with (
        pytest.raises(TrainingDiverged),
        RunLogger(tmp_path, LogConfig(every=10), 5, "t") as log,
    ):
        log.row(1, {"loss": 1.0})
        raise TrainingDiverged("diverged", 2, {"loss": math.nan})
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert row["step"] == 2 and row["loss"] is None


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_disk_that_fills_up_is_one_line(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/full")
    with (
        pytest.raises(UserError, match=rf"{name} cannot be written: No space left"),
        RunLogger(tmp_path, LogConfig(), 5, "t") as log,
    ):
        log.row(1, {"loss": 1.0})
        log.samples(1, [{"prompt": "x"}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1}\n{"st\n{"step": 3}\n', r"m\.jsonl:2: not valid JSON"),
        ('{"step": 1}\n3\n', r"m\.jsonl:2: expected an object, got 3"),
    ],
)
def test_a_broken_line_in_the_middle_is_named(tmp_path, text, message):
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_jsonl(tmp_path / "m.jsonl")


def test_every_thins_rows_but_keeps_evaluations_and_the_last(tmp_path):
    with RunLogger(tmp_path, LogConfig(every=4), 10, "t") as log:
        for step in range(1, 11):
            log.row(step, {"loss": 1.0, **({"eval/loss": 1.0} if step == 3 else {})})
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [3, 4, 8, 10]


def test_samples_keep_unicode_and_gain_the_step(tmp_path):
    with RunLogger(tmp_path, LogConfig(), 1, "t") as log:
        log.samples(4, [{"prompt": "naïve ✓"}])
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"step": 4, "prompt": "naïve ✓"}]


def test_a_last_line_cut_short_is_left_out(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1}]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with RunLogger(tmp_path, LogConfig(tensorboard=True), 1, "t") as log:
        log.row(1, {"loss": 1.0})
        log.samples(1, [{}])
        log.advance(1, loss=1.0)
    assert list(tmp_path.iterdir()) == []
    assert log.last == {"loss": 1.0}


def test_tensorboard_files_when_asked(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is an extra")
    with RunLogger(tmp_path, LogConfig(tensorboard=True), 1, "t") as log:
        log.row(1, {"loss": 1.0})
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_wandb_that_is_not_installed_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb_project"):
        RunLogger(tmp_path, LogConfig(wandb_project="p"), 1, "t")


def test_the_error_of_a_run_passes_through_and_closes_the_files(tmp_path):
    with (
        pytest.raises(RuntimeError, match="diverged"),
        RunLogger(tmp_path, LogConfig(), 5, "t") as log,
    ):
        log.row(1, {"loss": 1.0})
        raise RuntimeError("diverged")
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1
