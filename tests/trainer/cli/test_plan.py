"""`s2srm plan`: its own options, which stage a recipe is for, what it prints."""

from __future__ import annotations

import json

import pytest

from s2srm.cli import main
from s2srm.commands.plan import find_stage, parse_memory, split


def test_plan_of_gemma_says_what_does_not_fit_and_what_helps(capsys):
    line = ["plan", "--config", "gemma-2b-sft", "--gpus", "1", "--gpu_memory", "30GiB", "--json"]
    assert main(line) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["models"]["model"]["parameters"] == 2_506_172_416
    assert "gemma-2b-sft" not in plan["models"]["model"]["architecture"]
    assert not plan["fits"] and plan["peak_bytes"] > 30 * 2**30
    assert any(remedy["fits"] for remedy in plan["remedies"])
    assert {phase["phase"] for phase in plan["phases"]} == {"load", "train", "save"}
    assert plan["step_seconds"] > 0
    assert main([*line[:-1], "--model.gradient_checkpointing", "false"]) == 0
    text = capsys.readouterr().out
    assert "does not fit" in text and "model.gradient_checkpointing true" in text


def test_a_folder_that_a_recipe_will_write_has_its_base_models_architecture():
    from s2srm.config import ModelConfig
    from s2srm.plan.sources import find_architecture

    found = find_architecture(ModelConfig(path="runs/gemma-2b/rm"), "model.path")
    assert found.config.vocab_size == 256000
    assert "recipe gemma-2b-rm" in found.origin and "google/gemma-2b" in found.origin
    demo = find_architecture(ModelConfig(path="runs/tiny/rm"), "model.path")
    assert "s2srm demo" in demo.origin


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plan --config gemma-2b-rm --gpus none", "--gpus must be a whole number"),
        ("plan --config gemma-2b-rm --gpu_memory 80", "--gpu_memory: expected a size"),
        ("plan --config gemma-2b-rm --device tpu", "--device must be"),
        ("plan --stage rm --model.path nobody/knows", "model.path nobody/knows: no config.json"),
        ("plan --gpus 8", "--stage is missing"),
        ("plan --config gemma-2b-rm --prompt_tokens 8", "given together"),
    ],
)
def test_wrong_input_is_one_line(line, said, capsys):
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_options_and_stages_are_told_apart():
    own, rest = split(["--gpus", "8", "--config", "x", "--json", "--optim.lr=1"])
    assert own == {"gpus": "8", "json": "true"}
    assert rest == ["--config", "x", "--optim.lr=1"]
    assert find_stage(["--config", "smollm2-135m-scalar-rm"]) == "scalar-rm"
    assert find_stage(["--config=tiny-ppo"]) == "ppo"
    assert (parse_memory("80GiB"), parse_memory("2 GB")) == (80 * 2**30, 2e9)
