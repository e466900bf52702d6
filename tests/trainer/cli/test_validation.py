"""Values of the right type that make no sense are refused by name, before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from s2srm.config import (
    DataConfig,
    ModelConfig,
    PPOConfig,
    RMConfig,
    StageConfig,
    TemplateConfig,
)
from s2srm.errors import UserError
from s2srm.validation import validate


@pytest.fixture
def rm(tmp_path) -> RMConfig:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("")
    return RMConfig(
        output=str(tmp_path / "out"),
        model=ModelConfig(path=str(tmp_path / "model")),
        data=DataConfig(path=str(tmp_path / "rows.jsonl")),
    )


@pytest.fixture
def ppo(rm) -> PPOConfig:
    reward = dataclasses.replace(PPOConfig().reward, model=rm.model)
    return PPOConfig(output=rm.output, policy=rm.model, reward=reward, data=rm.data)


def change(cfg: Any, key: str, value: Any) -> Any:
    """The config with one dotted key changed."""
    name, _, rest = key.partition(".")
    return dataclasses.replace(
        cfg, **{name: change(getattr(cfg, name), rest, value) if rest else value}
    )


def test_good_configs_pass(rm, ppo):
    validate(rm)
    validate(ppo)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output", ""),
        ("seed", -1),
        ("model.path", ""),
        ("model.path", "/no/such/model"),
        ("data.path", ""),
        ("data.path", "missing.jsonl"),
        ("data.limit", 0),
        ("data.max_prompt_tokens", 0),
        ("data.format", "columns"),
        ("optim.lr", 0.0),
        ("optim.lr", math.nan),
        ("optim.betas", (0.9, 1.0)),
        ("optim.eps", 0.0),
        ("optim.warmup_steps", -1),
        ("optim.max_grad_norm", -1.0),
        ("epochs", 0.0),
        ("max_steps", 0),
        ("batch_size", 0),
        ("microbatch_tokens", 0),
        ("log.every", 0),
        ("identity_weight", -0.1),
        ("probe_rows", -1),
    ],
)
def test_bad_value_of_rm_names_its_key(rm, key, value):
    with pytest.raises(UserError, match=key.replace(".", r"\.").removesuffix("format")):
        validate(change(rm, key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy.path", ""),
        ("reference", "/no/such/model"),
        ("reward.model.path", ""),
        ("reward.token.top_k", 0),
        ("reward.token.negative", -1.0),
        ("reward.clip", -1.0),
        ("reward.calibration_prompts", 1),
        ("critic.path", "/no/such/model"),
        ("critic.optim.lr", 0.0),
        ("critic.clip", -0.1),
        ("sampling.temperature", 0.0),
        ("sampling.max_new_tokens", 0),
        ("kl.coef", -0.1),
        ("kl.target", 0.0),
        ("total_steps", 0),
        ("minibatch_size", 129),
        ("ppo_epochs", 0),
        ("gamma", 1.1),
        ("lam", -0.1),
        ("clip_low", 1.5),
        ("clip_high", -0.2),
        ("vf_coef", -1.0),
        ("samples_every", 0),
    ],
)
def test_bad_value_of_ppo_names_its_key(ppo, key, value):
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        validate(change(ppo, key, value))


def test_no_mapping_at_all_is_refused(rm):
    with pytest.raises(UserError, match="nothing to learn"):
        validate(dataclasses.replace(rm, correction_weight=0.0, identity_weight=0.0))


def test_hub_names_are_left_to_the_loader(rm):
    validate(dataclasses.replace(rm, model=ModelConfig(path="google/gemma-2b")))
    validate(dataclasses.replace(rm, data=DataConfig(path="PKU-Alignment/PKU-SafeRLHF")))


def test_a_plain_stage_needs_an_output_only():
    validate(StageConfig(output="x"))


def test_paths_are_expanded_and_nothing_else(rm, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    cfg = dataclasses.replace(
        rm,
        output="~/out",
        model=ModelConfig(path="~/model"),
        data=DataConfig(path="~/rows.jsonl", columns={"prompt": "~"}),
        template=TemplateConfig(separator="~"),
    )
    checked = validate(cfg)
    assert checked.output == str(tmp_path / "out")
    assert checked.model.path == rm.model.path and checked.data.path == rm.data.path
    assert checked.data.columns == {"prompt": "~"} and checked.template.separator == "~"
    assert validate(checked) == checked
    assert validate(dataclasses.replace(rm, output="$HOME/x")).output == "$HOME/x"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "rows.jsonl"}


@pytest.mark.parametrize("key", ["output", "model.path", "data.path"])
def test_a_user_that_is_not_there_is_named(rm, key):
    with pytest.raises(UserError, match=rf"{key}: ~nobody-here/x: there is no user 'nobody-here'"):
        validate(change(rm, key, "~nobody-here/x"))


@pytest.mark.parametrize("key", ["policy.path", "reference", "critic.path", "reward.model.path"])
def test_every_path_of_ppo_is_expanded(ppo, tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = validate(change(ppo, key, "~/model"))
    for name in key.split("."):
        found = getattr(found, name)
    assert found == str(tmp_path / "model")


def test_an_output_that_cannot_be_written_is_found_without_the_data(rm, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^output: \S*file/run: \S*file is a file"):
        validate(change(rm, "output", str(tmp_path / "file" / "run")))


@pytest.mark.parametrize("name", ["x" * 5000, "nul\0byte"])
def test_names_that_no_file_can_have(rm, name):
    with pytest.raises(UserError, match=r"model\.path: .* does not exist"):
        validate(change(rm, "model.path", "./" + name))
    with pytest.raises(UserError, match=r"data\.path: .* does not exist"):
        validate(change(rm, "data.path", "./" + name))
