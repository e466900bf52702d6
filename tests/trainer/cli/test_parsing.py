"""Recipes and flags become configs; everything wrong becomes one line that names it."""

from __future__ import annotations

import dataclasses

import pytest

from s2srm.commands.correct import CorrectConfig
from s2srm.commands.parsing import fields_of, nearest_key, parse, recipe_names
from s2srm.config import PPOConfig, RMConfig, SFTConfig, StageConfig
from s2srm.errors import UserError


def rm(*argv: str) -> RMConfig:
    return parse(RMConfig, argv, "rm", "")


def write(folder, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_without_arguments_every_value_is_the_default():
    assert rm() == RMConfig()


def test_flags_override_the_recipe_and_leave_its_other_values(tmp_path):
    recipe = write(
        tmp_path, "output: out\noptim:\n  lr: 1e-4\n  eps: 1e-8\neval_data:\n  path: dev\n"
    )
    cfg = rm("--config", recipe, "--optim.lr", "0.5", "--eval_data.limit", "7")
    assert (cfg.output, cfg.optim.lr, cfg.optim.eps) == ("out", 0.5, 1e-8)
    assert cfg.eval_data is not None and (cfg.eval_data.path, cfg.eval_data.limit) == ("dev", 7)


def test_a_later_recipe_wins(tmp_path):
    first = write(tmp_path, "seed: 1\nbatch_size: 3\n")
    second = tmp_path / "second.yaml"
    second.write_text("seed: 2\n")
    cfg = rm("--config", first, f"--config={second}")
    assert (cfg.seed, cfg.batch_size) == (2, 3)


def test_config_is_typed_dataclasses_all_the_way_down(tmp_path):
    cfg = parse(PPOConfig, ["--critic.optim.betas", "[0.5, 0.6]"], "ppo", "")
    assert cfg.critic.optim.betas == (0.5, 0.6)
    assert dataclasses.replace(cfg, critic=PPOConfig().critic) == PPOConfig()


def test_a_switch_needs_no_value():
    assert rm("--overwrite", "--seed", "3").overwrite
    assert rm("--seed", "3", "--overwrite").overwrite
    assert not rm("--overwrite", "false").overwrite


def test_free_form_mapping_takes_dotted_keys():
    cfg = rm("--data.columns.prompt", "question", "--data.columns.chosen", "good")
    assert cfg.data.columns == {"prompt": "question", "chosen": "good"}


@pytest.mark.parametrize(
    "text",
    [
        "--- x",
        "-5 + 3",
        "--response",
        "--response=x",
        "null",
        "~",
        "123",
        "[a",
        "{a: 1}",
        "",
        "é\nb",
    ],
)
@pytest.mark.parametrize("glued", [True, False])
def test_a_text_is_taken_as_it_is(text, glued):
    argv = [f"--response={text}"] if glued else ["--response", text]
    cfg = parse(CorrectConfig, [*argv, "--plain"], "correct", "", texts=("response",))
    assert cfg.response == text and cfg.plain


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--template.separator", "---"], "template.separator", "---"),
        (["--template.separator", "~"], "template.separator", "~"),
        (["--template.separator", "-- fix --"], "template.separator", "-- fix --"),
        (["--template.separator", "null"], "template.separator", None),
        (["--seed", "-1"], "seed", -1),
        (["--optim.lr", "-1e-5"], "optim.lr", -1e-5),
        (["--optim.lr", "1E-5"], "optim.lr", 1e-5),
        (["--data.columns.prompt=--q"], "data.columns", {"prompt": "--q"}),
        (["--overwrite", "yes"], "overwrite", True),
        (["--overwrite", "off"], "overwrite", False),
    ],
)
def test_values_that_look_like_something_else(argv, key, value):
    found = rm(*argv)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "1"], "unknown option --lr; did you mean 'optim.lr'?"),
        (["--model-path", "x"], "did you mean 'model.path'?"),
        (["--max-steps", "1"], "did you mean 'max_steps'?"),
        (["--data.colums", "x"], "did you mean 'data.columns'?"),
        (["--output"], "--output: its value is missing"),
        (["--output", "--overwrite"], "--output: its value is missing before --overwrite"),
        (
            ["--model", "x"],
            "--model: it has settings of its own, got 'x'; did you mean --model.path",
        ),
        (["--eval_data", "x"], "did you mean --eval_data.path?"),
        (["--data.columns", "x"], "(as in --data.columns.NAME VALUE)"),
        (["--optim.betas", "0.9", "0.95"], "unexpected argument '0.95': a setting is --key value"),
        (["--overwrite", "1"], "overwrite: expected true or false, got '1'"),
        (["--optim.lr", "null"], "optim.lr: expected float, got null"),
        (["--max_steps", "1.5"], "max_steps: expected int or null, got '1.5'"),
        (["--optim.lrr", "1"], "unknown option --optim.lrr; did you mean 'optim.lr'?"),
        (["--outptu", "x"], "did you mean 'output'?"),
        (["--optim.lr", "abc"], "optim.lr: expected float, got 'abc'"),
        (["--batch_size", "2.5"], "batch_size: expected int, got '2.5'"),
        (
            ["--engine.kind", "gpu"],
            "engine.kind: expected one of auto, torch, deepspeed, got 'gpu'",
        ),
        (["--max_steps", "many"], "max_steps: expected int or null, got 'many'"),
        (["--eval_data.limit", "x"], "eval_data.limit: expected int or null, got 'x'"),
        (["--seed", "null"], "seed: expected int"),
        (["--config"], "--config: the path of a recipe is missing"),
        (["--config", "/no/such.yaml"], "'/no/such.yaml' is neither a file nor a shipped recipe"),
        (["--config", "gema-2b-rm"], "did you mean 'gemma-2b-rm'?"),
        (["stray"], "stray"),
    ],
)
def test_bad_flag(argv, message):
    with pytest.raises(UserError) as caught:
        rm(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("outpt: x\n", "unknown key 'outpt'; did you mean 'output'?"),
        ("model:\n  pth: x\n", "unknown key 'model.pth'; did you mean 'model.path'?"),
        (
            "eval_data:\n  pathh: x\n",
            "unknown key 'eval_data.pathh'; did you mean 'eval_data.path'?",
        ),
        ("optim:\n  lr: fast\n", "optim.lr: expected float, got 'fast'"),
        ("eval_data:\n  limit: x\n", "eval_data.limit: expected int or null, got 'x'"),
        ("optim: {betas: [1]}\n", "optim.betas: expected tuple[float, float], got '[1]'"),
        ("seed: null\n", "seed: expected int, got null"),
        ("output: 3\n", "output: expected str, got '3'"),
        ("model: 3\n", "model: expected settings as `key: value`, got 3"),
        ("- a\n", "expected settings as `key: value`, got ['a']"),
        ("", "expected settings as `key: value`, got None"),
        ("a: [\n", "not valid YAML"),
        ("optim:\n\tlr: 1\n", ":2: not valid YAML: found character '\\t'"),
        ("output: a\noutput: b\n", ":2: not valid YAML: the key 'output' is given twice"),
        ("model: {path: a, path: b}\n", ":1: not valid YAML: the key 'path' is given twice"),
        ("output:\n", "output: expected str, got null (nothing after it)"),
        ("data: rows.jsonl\n", "data: expected settings as `key: value`, got 'rows.jsonl'"),
    ],
)
def test_bad_recipe(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        rm("--config", write(tmp_path, text))
    assert message in str(caught.value)


def test_null_is_fine_where_the_type_allows_it(tmp_path):
    cfg = rm("--config", write(tmp_path, "max_steps: null\neval_data: null\n"))
    assert cfg.max_steps is None and cfg.eval_data is None


def test_help_shows_every_setting_with_its_doc_comment(capsys):
    with pytest.raises(SystemExit) as caught:
        rm("--help")
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    missing = [k for k in fields_of(RMConfig) if f"--{k}" not in shown and "eval_data." not in k]
    assert missing == []
    assert "Weight of the examples (prompt, rejected) -> chosen." in shown
    assert "tiny-rm" in shown


def test_nearest_says_nothing_where_nothing_is_near():
    assert nearest_key("zzzz", ["output", "seed"]) == ""


def test_fields_of_descends_into_optional_groups():
    keys = fields_of(SFTConfig)
    assert {"eval_data", "eval_data.path", "engine.kind", "response_column"} <= set(keys)
    assert set(fields_of(StageConfig)) < set(keys)


def test_recipe_names_by_command():
    assert "gemma-2b-rm" in recipe_names("rm")
    assert not any(name.endswith("scalar-rm") for name in recipe_names("rm"))
    assert "gemma-2b-scalar-rm" in recipe_names("scalar-rm")
