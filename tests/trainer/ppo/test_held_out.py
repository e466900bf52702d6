"""Evaluation while PPO runs: what is logged, that it changes nothing, the best policy kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from ppo_tiny import lm, ppo_config, prompts_file, save_folder
from safetensors.torch import load_file

from s2srm.config import DataConfig
from s2srm.errors import UserError
from s2srm.ppo import train as ppo

METRIC = "eval/reward/sum_mean"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    save_folder(lm("llama", scale=4.0), folder / "policy")
    save_folder(lm("llama", seed=1), folder / "rm")
    prompts_file(folder / "prompts.jsonl")
    prompts_file(folder / "held_out.jsonl", 7)
    return folder


def config(root, output, **changes):
    data = DataConfig(
        str(root / "held_out.jsonl"), format="columns", columns={"prompt": "prompt"}, limit=5
    )
    values = {"eval_data": data, "eval_every": 2, "total_steps": 3, "keep_best": METRIC}
    return ppo_config(root, output=str(output), **(values | changes))


def rows(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_evaluations_change_nothing_and_the_best_policy_is_kept(root, tmp_path):
    evaluated, plain = tmp_path / "evaluated", tmp_path / "plain"
    ppo.run(config(root, evaluated))
    ppo.run(config(root, plain, eval_data=None, keep_best=None))
    found, without = rows(evaluated), rows(plain)
    assert [row["step"] for row in found if METRIC in row] == [0, 2, 3]
    for row in found:
        measured = {name: value for name, value in row.items() if name.startswith("eval/")}
        assert len(measured) in (0, 6) and all(math.isfinite(value) for value in measured.values())
    assert found[0]["eval/kl/per_response"] == pytest.approx(0.0, abs=1e-5)
    assert abs(found[-1]["eval/kl/per_response"]) > 1e-4
    for row, same in zip(found[1:], without, strict=True):
        ignored = {"time"} | {name for name in row if name.startswith(("time/", "eval/"))}
        assert {k: v for k, v in row.items() if k not in ignored} == {
            k: v for k, v in same.items() if k not in ignored
        }
    best = json.loads((evaluated / "best" / "best.json").read_text())
    wanted = max((row for row in found if METRIC in row), key=lambda row: row[METRIC])
    assert best == {"metric": METRIC, "value": wanted[METRIC], "step": wanted["step"]}
    assert not (plain / "best").exists()


def test_what_is_kept_is_the_policy_of_that_step(root, tmp_path):
    """By a metric whose best value is the last phase's or the first's, the weights are known."""
    cfg = config(root, tmp_path / "run", total_steps=1, eval_temperature=0.0)
    ppo.run(replace(cfg, keep_best="eval/kl/per_response"))
    first, last = (row["eval/kl/per_response"] for row in rows(tmp_path / "run"))
    source = tmp_path / "run" if last > first else root / "policy"
    kept = load_file(tmp_path / "run" / "best" / "model.safetensors")
    for name, tensor in load_file(source / "model.safetensors").items():
        assert tensor.equal(kept[name]), name


def test_a_metric_that_is_not_measured_is_named(root, tmp_path):
    cfg = config(root, tmp_path / "run", keep_best="eval/reward")
    with pytest.raises(UserError, match=r"no eval/reward; it has .*eval/reward/sum_mean"):
        ppo.run(cfg)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"keep_best": "reward/sum_mean"}, r"keep_best must name a metric of the evaluation"),
        ({"eval_data": None}, r"keep_best is eval/reward/sum_mean and eval_data is missing"),
        ({"eval_data": DataConfig("/nowhere.jsonl")}, r"eval_data\.path: /nowhere\.jsonl"),
    ],
)
def test_settings_without_sense(root, tmp_path, changes, match):
    with pytest.raises(UserError, match=match):
        ppo.run(config(root, tmp_path / "run", **changes))
