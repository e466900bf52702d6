"""A run that is interrupted and resumed equals one that is not; and every part of it counts."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs_tiny import STAGES, assert_same_run, config, interrupted, rows_without_times, run

from s2srm.checkpoint import files
from s2srm.checkpoint.rng import rng_state, set_rng_state
from s2srm.checkpoint.saver import Checkpoints
from s2srm.config import KLConfig
from s2srm.engine import Engine
from s2srm.ppo.kl import KLController
from s2srm.runs import FINISHED


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_run_equals_a_whole_one(
    stage: str, whole: dict[str, Path], inputs: Path, tmp_path: Path
) -> None:
    cfg = config(stage, inputs, tmp_path / "cut", resume="auto")
    interrupted(stage, cfg, after=2)
    result = run(stage, cfg)
    assert_same_run(whole[stage], tmp_path / "cut")
    steps = [row["step"] for row in rows_without_times(tmp_path / "cut")]
    assert steps == sorted(set(steps))
    wanted = json.loads((whole[stage] / FINISHED).read_text())["metrics"]
    assert wanted.keys() == result.metrics.keys()
    for name, value in wanted.items():
        assert name.startswith("time/") or result.metrics[name] == value, name


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_bfloat16_goes_on_from_its_float32_masters(
    optim: Any, inputs: Path, tmp_path: Path
) -> None:
    def changed(out: Path, **more: Any) -> Any:
        cfg: Any = config("sft", inputs, out, precision="bfloat16", **more)
        return replace(cfg, optim=replace(cfg.optim, name=optim, lr=1e-3))

    run("sft", changed(tmp_path / "whole"))
    cfg = changed(tmp_path / "cut", resume="auto")
    interrupted("sft", cfg, after=3)
    run("sft", cfg)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.fixture(scope="module")
def cut_short(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PPO run that ended after its second phase."""
    folder = tmp_path_factory.mktemp("cut-short") / "run"
    interrupted("ppo", config("ppo", inputs, folder), after=2)
    return folder


@pytest.mark.parametrize("lost", ["moments", "num_steps", "kl", "reward_scale", "metrics"])
def test_no_part_can_be_left_out(
    lost: str,
    whole: dict[str, Path],
    cut_short: Path,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The comparison of the other tests sees every part."""
    shutil.copytree(cut_short, tmp_path / "cut")
    cfg = config("ppo", inputs, tmp_path / "cut", resume="auto")
    resume = Checkpoints.resume

    def forgetful(self: Checkpoints, start: Any) -> int:
        policy: Engine = self.engines["policy"]
        if lost in ("kl", "reward_scale"):
            part: Any = self.parts[lost]
            before = part.state_dict()
            done = resume(self, start)
            part.load_state_dict(before)
            return done
        done = resume(self, start)
        assert policy.optimizer is not None
        if lost == "moments":
            policy.optimizer.state.clear()
        if lost == "num_steps":
            policy.num_steps = 0
        if lost == "metrics":
            log: Any = self.parts["log"]
            log.row(2, {"twice": 1.0})
        return done

    monkeypatch.setattr(Checkpoints, "resume", forgetful)
    run("ppo", cfg)
    with pytest.raises(AssertionError):
        assert_same_run(whole["ppo"], tmp_path / "cut")


def test_rows_written_after_the_checkpoint_are_written_again(inputs: Path, tmp_path: Path) -> None:
    run("rm", config("rm", inputs, tmp_path / "whole", save_every=2))
    cfg = config("rm", inputs, tmp_path / "cut", save_every=2, resume="auto")
    interrupted("rm", cfg, after=3)
    before = (tmp_path / "cut" / "metrics.jsonl").read_text()
    assert json.loads(before.splitlines()[-1])["step"] == 3
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')  # cut short by the crash
    run("rm", cfg)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_random_number_generators_go_on() -> None:
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    random.gauss(0, 1)
    np.random.standard_normal()
    torch.rand(3)
    state = json.loads(json.dumps(rng_state()))

    def draws() -> list[Any]:
        return [random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist()]

    wanted = draws()
    draws()
    set_rng_state(state)
    assert draws() == wanted


def test_kl_controller_goes_on() -> None:
    one = KLController(KLConfig(0.1, "adaptive", target=1.0, horizon=10))
    one.update(3.0, 4)
    two = KLController(KLConfig(0.1, "adaptive", target=1.0, horizon=10))
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    one.update(0.3, 4)
    two.update(0.3, 4)
    assert one.coef == two.coef != 0.1


def test_checkpoints_are_written_when_they_are_due(inputs: Path, tmp_path: Path) -> None:
    cfg = config("sft", inputs, tmp_path / "run", save_every=2, keep_checkpoints=2)
    run("sft", cfg)
    found = files.list_checkpoints(tmp_path / "run")
    assert [files.step_of(path) for path in found] == [5, 4]
    run("sft", config("sft", inputs, tmp_path / "none", save_every=0))
    assert not files.checkpoints_of(tmp_path / "none").exists()
