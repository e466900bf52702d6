"""The best model of a run: better is better, a kill leaves the old one or the new one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from s2srm.checkpoint.best import BestModel, is_better


class Weights:
    """Saves a number as its model."""

    def __init__(self) -> None:
        self.now = 0

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "model").write_text(str(self.now))


def best_of(output: Path, engine: Weights, metric: str = "eval/loss") -> BestModel:
    return BestModel(metric, output, engine.save)


def kept(output: Path) -> tuple[str, int]:
    record = json.loads((output / "best" / "best.json").read_text())
    return (output / "best" / "model").read_text(), record["step"]


def evaluated(best: BestModel, engine: Weights, losses: dict[int, float]) -> None:
    for step, loss in losses.items():
        engine.now = step
        best.after_evaluation(step, {"loss": 0.0, "eval/loss": loss})


def test_only_a_better_value_replaces_what_is_kept(tmp_path):
    engine = Weights()
    best = best_of(tmp_path, engine)
    best.after_evaluation(1, {"loss": 1.0})
    assert not (tmp_path / "best").exists(), "no evaluation"
    evaluated(best, engine, {2: 3.0, 3: 2.0, 4: 2.0, 5: 2.5})
    assert kept(tmp_path) == ("3", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_resumed_run_compares_with_what_is_there(tmp_path):
    engine = Weights()
    evaluated(best_of(tmp_path, engine), engine, {1: 2.0})
    evaluated(best_of(tmp_path, engine), engine, {2: 2.5})
    assert kept(tmp_path) == ("1", 1)
    evaluated(best_of(tmp_path, engine), engine, {3: 1.0})
    assert kept(tmp_path) == ("3", 3)
    # By another metric nothing is known of the past.
    other = best_of(tmp_path, engine, "eval/accuracy")
    other.after_evaluation(4, {"eval/accuracy": 0.1})
    assert kept(tmp_path)[1] == 4


@pytest.mark.parametrize("moment", ["model", "written", "renamed"])
def test_killed_while_saving(tmp_path, monkeypatch, moment):
    """Half-written: the old one stays. Complete: one of the two, and never none after a resume."""

    class Killed(BaseException):
        pass

    engine = Weights()
    evaluated(best_of(tmp_path, engine), engine, {1: 2.0})

    def die(*_: object) -> None:
        raise Killed

    if moment == "model":
        monkeypatch.setattr("s2srm.checkpoint.best.write_json", die)
    elif moment == "written":
        monkeypatch.setattr("s2srm.checkpoint.best._replace", die)
    else:
        rename, calls = Path.rename, []

        def rename_once(path: Path, target: Path) -> Path:
            calls.append(path)
            return rename(path, target) if len(calls) == 1 else die() or path

        monkeypatch.setattr(Path, "rename", rename_once)
    with pytest.raises(Killed):
        evaluated(best_of(tmp_path, engine), engine, {2: 1.0})
    monkeypatch.undo()
    best = best_of(tmp_path, engine)
    assert kept(tmp_path) == (("2", 2) if moment == "renamed" else ("1", 1))
    evaluated(best, engine, {2: 1.0, 3: 1.5})
    assert kept(tmp_path) == ("2", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_better():
    assert is_better("eval/loss", 1.0, 2.0) and is_better("eval/correction_loss", 1.0, 2.0)
    assert is_better("eval/accuracy", 2.0, 1.0) and not is_better("eval/accuracy", 1.0, 1.0)
    assert not is_better("eval/loss", float("nan"), 1.0)
