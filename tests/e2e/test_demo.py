"""The demo through its command, with every stage real and every size tiny; then the commands that
read what it left: correct, eval on plain prompts, report, and the errors of mismatched models.

The sizes say nothing about quality; that the method works is the business of the full demo.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2srm.cli import main
from s2srm.commands import demo_settings
from s2srm.commands.demo_settings import DemoSettings
from s2srm.jsonl import read_jsonl

MICRO = DemoSettings(
    demonstrations=96,
    preferences=64,
    dev_rows=8,
    prompts=32,
    sft_steps=4,
    rm_steps=3,
    scalar_rm_steps=3,
    batch_size=16,
    ppo_phases=2,
    rollout_size=16,
    minibatch_size=8,
    ppo_epochs=1,
    max_new_tokens=12,
    eval_prompts=8,
)
TEMPLATE = ("--template.kind", "plain", "--template.separator", " <fix> ")
STAGES = ("sft", "rm", "scalar-rm", "ppo-scalar", "ppo-seq2seq")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder of the world, what the command printed)."""
    output = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo_settings.SETTINGS, "safety", MICRO)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = main(["demo", "--world", "safety", "--output", str(output)])
    assert code == 0
    return output / "safety", printed.getvalue()


def test_every_stage_leaves_a_model_that_transformers_loads(demo):
    folder, _ = demo
    for stage in STAGES:
        model = AutoModelForCausalLM.from_pretrained(folder / stage)
        tokenizer = AutoTokenizer.from_pretrained(folder / stage)
        assert model.config.vocab_size == len(tokenizer)
        assert (folder / stage / "s2srm_template.json").is_file()
    assert (folder / "scalar-rm" / "score_head.safetensors").is_file()


def test_training_moved_every_model(demo):
    folder, _ = demo

    def weights(name: str):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        return model.get_input_embeddings().weight

    sft = weights("sft")
    assert not sft.equal(weights("data/model"))
    for stage in STAGES[1:]:
        assert not sft.equal(weights(stage)), stage


def test_metrics_are_finite_and_complete(demo):
    folder, _ = demo
    for stage in STAGES:
        rows = read_jsonl(folder / stage / "metrics.jsonl")
        values = [v for row in rows for v in row.values()]
        assert rows and all(v is not None and math.isfinite(v) for v in values), stage
    last = read_jsonl(folder / "rm" / "metrics.jsonl")[-1]
    for name in ("copied_fraction", "correction_token_accuracy", "reward_length_correlation"):
        assert f"eval/{name}" in last
    first = read_jsonl(folder / "ppo-seq2seq" / "metrics.jsonl")[0]
    assert first["kl/k1"] == pytest.approx(0.0, abs=1e-5), "the policy starts as its reference"
    assert first["ppo/first_ratio_error"] < 1e-5


def test_both_ppos_differ_in_the_reward_only(demo):
    folder, _ = demo
    scalar, seq2seq = (
        (folder / f"ppo-{kind}" / "config.yaml").read_text().splitlines()
        for kind in ("scalar", "seq2seq")
    )
    different = {a.split(":")[0].strip() for a, b in zip(scalar, seq2seq, strict=True) if a != b}
    assert different == {"output", "kind", "path"}


def test_table_is_printed_with_every_policy_and_the_page_exists(demo):
    folder, printed = demo
    for group in ("test prompts, greedy", "test prompts, temperature 1", "out-of-distribution"):
        assert group in printed
    for word in ("wins vs", "sft", "ppo-scalar", "ppo-seq2seq", "harmless", "harmful", "words"):
        assert word in printed
    assert f"report: {folder.resolve() / 'report.html'}" in printed
    html = (folder / "report.html").read_text()
    assert html.count("<article>") >= 10 and "<svg" in html


def test_evaluation_is_paired_and_over_both_splits(demo):
    folder, _ = demo
    rows = read_jsonl(folder / "eval" / "responses.jsonl")
    assert len(rows) == 3 * 2 * 2 * MICRO.eval_prompts
    result = json.loads((folder / "eval" / "eval.json").read_text())
    assert [(g["split"], g["temperature"]) for g in result["groups"]] == [
        ("test", 0.0),
        ("test", 1.0),
        ("ood", 0.0),
        ("ood", 1.0),
    ]
    for group in result["groups"]:
        assert group["num_prompts"] == MICRO.eval_prompts
        assert set(group["policies"]) == {"sft", "ppo-scalar", "ppo-seq2seq"}
        assert set(group["policies"]["ppo-seq2seq"]["win_rate"]) == {"sft", "ppo-scalar"}


def test_feedback_agrees_with_the_generated_correction_up_to_the_divergence(demo):
    folder, _ = demo
    rows = read_jsonl(folder / "eval" / "feedback.jsonl")
    assert len(rows) == 12
    for row in rows:
        k = row["divergence_index"]
        k = len(row["tokens"]) if k is None else k
        assert row["tokens"][:k] == row["correction_tokens"][:k]
        assert all(r == 1.0 for r in row["rewards"][:k])
        assert all(r <= 0.0 for r in row["rewards"][k:])
        assert row["sum"] == pytest.approx(sum(row["rewards"]))
        if k < len(row["tokens"]):
            assert row["rm_tokens"][k] != row["tokens"][k].strip()
            assert row["rewards"][k] == -1.0


def test_correct_prints_json_plain_and_colours(demo, capsys):
    folder, _ = demo
    row = read_jsonl(folder / "eval" / "feedback.jsonl")[0]
    text = row["response"] or "sorry"
    argv = ["correct", "--rm", str(folder / "rm"), "--prompt", row["prompt"], "--response", text]
    argv += ["--max_new_tokens", "24"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["response"] == text and len(found["rewards"]) == len(found["tokens"])
    assert "".join(found["tokens"][:-1]).strip() == text
    assert main([*argv, "--plain"]) == 0
    plain = capsys.readouterr().out
    assert "\x1b[" not in plain and f"response: {text}" in plain and "correction: " in plain
    assert main([*argv, "--token.mode", "aligned"]) == 0
    assert "correction" in capsys.readouterr().out


def test_eval_on_prompts_without_a_world(demo, tmp_path, capsys):
    folder, _ = demo
    argv = ["eval", "--output", str(tmp_path / "eval"), "--num_prompts", "4"]
    argv += [f"--policies.{name}={folder / name}" for name in ("sft", "ppo-seq2seq")]
    argv += ["--data.path", str(folder / "data" / "prompts_test.jsonl")]
    argv += ["--reward_model.path", str(folder / "rm"), "--sampling.max_new_tokens", "8"]
    assert main(argv) == 0
    assert "not a judgement of quality" in " ".join(capsys.readouterr().out.split())
    result = json.loads((tmp_path / "eval" / "eval.json").read_text())
    policy = result["groups"][0]["policies"]["ppo-seq2seq"]
    assert -1.0 <= policy["score"]["mean"] <= 1.0
    assert 0.0 <= policy["agreement"]["mean"] <= 1.0
    assert policy["safety"] is None and result["against"] == ["sft"]


def test_report_of_one_run(demo, tmp_path):
    folder, _ = demo
    assert main(["report", str(folder / "ppo-seq2seq"), "--out", str(tmp_path / "p.html")]) == 0
    html = (tmp_path / "p.html").read_text()
    assert "<article>" in html and "kl/per_response" in html


def test_a_stage_does_not_replace_the_run_that_is_there(demo, capsys):
    folder, _ = demo
    argv = ["sft", "--output", str(folder / "sft"), "--model.path", str(folder / "data" / "model")]
    argv += ["--data.path", str(folder / "data" / "sft.jsonl"), *TEMPLATE]
    one_line_error([*argv, "--response_column", "response"], "already holds a run", capsys)


@pytest.fixture
def ppo_argv(demo, tmp_path):
    folder, _ = demo
    return [
        *("ppo", "--output", str(tmp_path / "out"), "--policy.path", str(folder / "sft")),
        *TEMPLATE,
        *("--data.path", str(folder / "data" / "prompts_train.jsonl")),
        *("--reward.model.path", str(tmp_path / "rm")),
    ]


def test_rm_with_another_tokenizer_is_refused(demo, tmp_path, ppo_argv, capsys):
    folder, _ = demo
    shutil.copytree(folder / "rm", tmp_path / "rm")
    path = tmp_path / "rm" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    one_line_error(ppo_argv, "tokenizer", capsys)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_rm_saved_with_another_template_is_refused(demo, tmp_path, ppo_argv, capsys):
    folder, _ = demo
    shutil.copytree(folder / "rm", tmp_path / "rm")
    path = tmp_path / "rm" / "s2srm_template.json"
    template = json.loads(path.read_text())
    path.write_text(json.dumps(template | {"separator_ids": [9]}))
    one_line_error(ppo_argv, "separator", capsys)


def test_scalar_rm_in_the_place_of_a_seq2seq_one_is_refused(demo, tmp_path, ppo_argv, capsys):
    folder, _ = demo
    shutil.copytree(folder / "scalar-rm", tmp_path / "rm")
    one_line_error(ppo_argv, "scalar", capsys)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"prompt": "a", "chosen": "b"}'], "rejected"),
        (
            ['{"prompt": "a", "chosen": "b", "rejected": "c"}', '{"prompt": "a", "cho'],
            "rows.jsonl:2",
        ),
        (['{"prompt": "a", "chosen": "", "rejected": "c"}'], "rows.jsonl:1"),
        (
            [json.dumps({"prompt": "i " * 300, "chosen": "b", "rejected": "c"})],
            "rows.jsonl:1",
        ),
    ],
    ids=["missing column", "broken line", "empty response", "long prompt"],
)
def test_bad_rows_stop_rm_before_training(demo, tmp_path, capsys, rows, message):
    folder, _ = demo
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(rows) + "\n")
    argv = ["rm", "--output", str(tmp_path / "out"), "--model.path", str(folder / "sft")]
    argv += ["--data.path", str(data), "--data.max_prompt_tokens", "100", *TEMPLATE]
    one_line_error(argv, message, capsys)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def one_line_error(argv: list[str], message: str, capsys) -> None:
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("s2srm: error: ")]
    assert len(lines) == 1 and message in lines[0], error
    assert "Traceback" not in error


def test_scaling_settings_keeps_everything_runnable():
    small = DemoSettings().scaled(1e-6)
    assert small.sft_steps >= 1 and small.eval_prompts >= 2 and small.preferences >= 64
    assert DemoSettings().scaled(1.0) == DemoSettings()
    kept = {"batch_size", "rollout_size", "minibatch_size", "kl_coef", "max_new_tokens"}
    assert all(getattr(small, name) == getattr(DemoSettings(), name) for name in kept)


def test_settings_exist_for_every_world():
    from s2srm.worlds import WORLDS

    assert set(demo_settings.SETTINGS) == set(WORLDS)
