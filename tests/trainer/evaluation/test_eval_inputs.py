"""Prompts of an evaluation are held to the same limits as a stage's, for all policies alike, and
everything that does not fit is found before a weight is loaded."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from s2srm.cli import main
from s2srm.config import DataConfig, ModelConfig, SamplingConfig, TemplateConfig
from s2srm.errors import UserError
from s2srm.evaluation import run as evaluation
from s2srm.evaluation.config import EvalConfig
from s2srm.models.value import SCORE_FILE

sys.path.insert(0, str(Path(__file__).parent.parent / "ppo"))
from ppo_tiny import EOS, SEPARATOR, VOCAB, lm, save_folder, template, tokenizer

REFUSES = (
    "{% for m in messages %}{% if 'z' in m['content'] %}{{ raise_exception('no z here') }}"
    "{% endif %}{{ m['content'] + ' ' }}{% endfor %}"
)


def gpt2(folder: Path, positions: int) -> Path:
    """A model of ours that has no more positions than that, and fails beyond them."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=positions,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    template().save(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    save_folder(lm("llama"), folder / "long")
    save_folder(lm("llama", seed=1), folder / "rm")
    gpt2(folder / "short", 24)
    picky = tokenizer()
    picky.chat_template = REFUSES
    lm("llama").save_pretrained(folder / "picky")
    picky.save_pretrained(folder / "picky")
    rows = ["a b", "z c", " ".join("d" * 30), "e", "f g h", "a b"]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": r}) + "\n" for r in rows))
    return folder


def config(root: Path, output: Path, *names: str, **changes) -> EvalConfig:
    cfg = EvalConfig(
        output=str(output),
        policies={name: str(root / name) for name in names},
        data=DataConfig(path=str(root / "rows.jsonl")),
        sampling=SamplingConfig(max_new_tokens=4),
        temperatures=[0.0],
        num_prompts=3,
        template=TemplateConfig(separator=SEPARATOR),
    )
    return replace(cfg, **changes)


def refused(cfg: EvalConfig, monkeypatch: pytest.MonkeyPatch, match: str) -> None:
    """Before any weight is loaded, and without a folder."""
    for name in ("load_lm", "FeedbackModel"):
        monkeypatch.setattr(evaluation, name, lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=match) as caught:
        evaluation.evaluate(cfg)
    assert "\n" not in str(caught.value)
    assert not Path(cfg.output).exists()


def answered(cfg: EvalConfig) -> dict[str, list[str]]:
    """Policy -> the prompts that it answered."""
    found: dict[str, list[str]] = {}
    for line in (evaluation.evaluate(cfg).output / "responses.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["policy"], []).append(row["prompt"])
    return found


def skipping(cfg: EvalConfig, **changes) -> EvalConfig:
    assert cfg.data is not None
    return replace(cfg, data=replace(cfg.data, **changes))


def test_a_prompt_over_max_prompt_tokens(root, tmp_path, monkeypatch, caplog):
    cfg = skipping(config(root, tmp_path / "out", "long"), max_prompt_tokens=10)
    assert answered(skipping(cfg, on_long_row="skip"))["long"] == ["a b", "z c", "e"]
    assert "1 of 5 prompts left out" in caplog.text
    refused(
        replace(cfg, output=str(tmp_path / "no")),
        monkeypatch,
        r"rows\.jsonl:3: the prompt has 30 tokens, over data\.max_prompt_tokens 10",
    )


def test_a_prompt_that_the_chat_template_refuses(root, tmp_path, monkeypatch):
    cfg = config(root, tmp_path / "out", "long", "picky", num_prompts=2)
    found = answered(skipping(cfg, on_bad_row="skip"))
    assert found["long"] == found["picky"] and "z c" not in found["long"]
    refused(replace(cfg, output=str(tmp_path / "no")), monkeypatch, r"rows\.jsonl:2: .*no z here")


def test_what_one_policy_cannot_hold_is_left_out_for_all(root, tmp_path, monkeypatch):
    cfg = config(root, tmp_path / "out", "long", "short", num_prompts=4)
    found = answered(skipping(cfg, on_long_row="skip"))
    assert found["long"] == found["short"] == ["a b", "z c", "e", "f g h"]
    match = r"rows\.jsonl:3: the prompt has 30 tokens and with sampling\.max_new_tokens 4 another 4"
    refused(replace(cfg, output=str(tmp_path / "no")), monkeypatch, match)


def test_more_new_tokens_than_positions_names_the_largest_value(root, tmp_path, monkeypatch):
    cfg = config(root, tmp_path / "no", "short", num_prompts=2, sampling=SamplingConfig())
    match = r"max_new_tokens 128 .*over the 24 positions of policies\.short .*: at most 22 fits"
    refused(cfg, monkeypatch, match)
    refused(skipping(cfg, on_long_row="skip"), monkeypatch, "at most 23 fits")
    fits = replace(cfg, output=str(tmp_path / "out"), sampling=SamplingConfig(max_new_tokens=22))
    monkeypatch.undo()
    assert answered(fits)["short"] == ["a b", "z c"]


def test_the_reward_model_needs_room_for_the_response_twice(root, tmp_path, monkeypatch):
    gpt2(tmp_path / "rm", 24)
    cfg = config(
        root,
        tmp_path / "out",
        "long",
        num_prompts=2,
        reward_model=ModelConfig(path=str(tmp_path / "rm")),
        sampling=SamplingConfig(max_new_tokens=10),
    )
    rows = [r["correction_tokens"] for r in _feedback(cfg)]
    assert rows and all(len(tokens) <= 10 for tokens in rows), "2 + 10 + 2 leave 10 of 24"
    cfg = replace(cfg, output=str(tmp_path / "no"), sampling=SamplingConfig(max_new_tokens=11))
    refused(cfg, monkeypatch, r"another 24 follow, over the 24 positions of reward_model.*most 10")


def _feedback(cfg: EvalConfig) -> list[dict]:
    lines = (evaluation.evaluate(cfg).output / "feedback.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_policy_is_looked_at_before_the_first_is_loaded(root, tmp_path, monkeypatch):
    save_folder(lm("llama"), tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    cfg = config(root, tmp_path / "no", "long")
    cfg = replace(cfg, policies={**cfg.policies, "b": str(tmp_path / "broken")})
    refused(cfg, monkeypatch, "broken")


def test_a_scalar_reward_model_writes_no_corrections(root, tmp_path, monkeypatch, capsys):
    folder = save_folder(lm("llama"), tmp_path / "scalar", score_seed=1)
    assert (folder / SCORE_FILE).is_file()
    cfg = config(root, tmp_path / "no", "long", reward_model=ModelConfig(path=str(folder)))
    refused(cfg, monkeypatch, r"^reward_model \S*scalar: it is a scalar reward model")
    assert main(["correct", "--rm", str(folder), "--prompt", "a", "--response", "b"]) == 2
    assert "rm " in capsys.readouterr().err


def test_evaluate_checks_its_values_from_python_too(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    refused(config(root, tmp_path / "no", "long", num_prompts=1), monkeypatch, "num_prompts")
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(root))
    cfg = config(root, tmp_path / "out", "long", policies={"long": "~/long"}, num_prompts=2)
    assert answered(skipping(cfg, path="~/rows.jsonl"))["long"] == ["a b", "z c"]


def test_a_world_prompt_that_does_not_fit_is_named(tmp_path, monkeypatch):
    from s2srm.worlds import get_world
    from s2srm.worlds.base import WorldSizes

    sizes = WorldSizes(2, 2, 2, 2, 2, 2)
    get_world("summarization").write(tmp_path / "data", sizes, 0)
    model = json.loads((tmp_path / "data" / "model" / "config.json").read_text())
    longest = model["max_position_embeddings"]
    cfg = EvalConfig(
        output=str(tmp_path / "no"),
        policies={"a": str(tmp_path / "data" / "model")},
        world="summarization",
        num_prompts=2,
        sampling=SamplingConfig(max_new_tokens=longest),
        template=get_world("summarization").template,
    )
    refused(cfg, monkeypatch, rf"summarization, test prompt \d: .*over the {longest} positions")
