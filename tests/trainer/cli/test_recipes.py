"""Every shipped recipe parses, makes sense, and names what other recipes or the demo make."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2srm.commands.parsing import parse, recipe_names
from s2srm.config import PPOConfig, RMConfig, ScalarRMConfig, SFTConfig, StageConfig
from s2srm.validation import validate

CONFIGS: dict[str, type[StageConfig]] = {
    "scalar-rm": ScalarRMConfig,
    "sft": SFTConfig,
    "rm": RMConfig,
    "ppo": PPOConfig,
}
MODELS = ("gemma-2b", "llama2-7b", "smollm2-135m", "tiny")


def load(name: str) -> StageConfig:
    stage = next(stage for stage in CONFIGS if name.endswith(f"-{stage}"))
    return parse(CONFIGS[stage], ["--config", name], stage, "")


def test_every_model_has_every_stage():
    assert recipe_names() == sorted(f"{model}-{stage}" for model in MODELS for stage in CONFIGS)


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_valid(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load(name)
    with pytest.raises(ValueError, match="does not exist"):
        # On an empty disk the first thing that is missing is named ...
        validate(cfg)
        raise ValueError("does not exist: sft of a hub model needs no files")
    make_inputs(cfg, name)
    validate(cfg)  # ... and with the inputs there nothing is.


def make_inputs(cfg: StageConfig, name: str) -> None:
    """The folders and files that the recipe reads."""
    models = (
        [cfg.policy.path, cfg.reward.model.path] if isinstance(cfg, PPOConfig) else [cfg.model.path]  # type: ignore[attr-defined]
    )
    for model in models:
        if model.startswith("runs/"):
            Path(model).mkdir(parents=True, exist_ok=True)
            (Path(model) / "config.json").write_text("{}")
    if name.startswith("tiny"):
        for data in (cfg.data, getattr(cfg, "eval_data", None)):  # type: ignore[attr-defined]
            if data is not None:
                Path(data.path).parent.mkdir(parents=True, exist_ok=True)
                Path(data.path).write_text("")


@pytest.mark.parametrize("model", MODELS)
def test_stages_of_a_model_feed_each_other(model):
    sft, rm, scalar, ppo = (load(f"{model}-{s}") for s in ("sft", "rm", "scalar-rm", "ppo"))
    assert isinstance(rm, RMConfig) and isinstance(scalar, ScalarRMConfig)
    assert isinstance(ppo, PPOConfig)
    assert rm.model.path == scalar.model.path == ppo.policy.path == sft.output
    assert ppo.reward.model.path == rm.output
    assert rm.data == scalar.data, "both reward models get the same triples"
    assert rm.template == ppo.template == sft.template
    assert len({sft.output, rm.output, scalar.output, ppo.output}) == 4
