"""`s2srm correct`: whatever text it is given, from wherever, within the positions of the model."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from s2srm.cli import main
from s2srm.evaluation import feedback

sys.path.insert(0, str(Path(__file__).parent.parent / "ppo"))
sys.path.insert(0, str(Path(__file__).parent.parent / "evaluation"))
from ppo_tiny import lm, save_folder
from test_eval_inputs import gpt2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("correct")
    save_folder(lm("llama"), folder / "rm")
    gpt2(folder / "short", 24)
    return folder


def correct(folder: Path, capsys, *argv: str) -> dict:
    """The JSON that it prints; an empty dict and its error under "error" where it fails."""
    code = main(["correct", "--rm", str(folder), "--json", *argv])
    printed = capsys.readouterr()
    if code != 0:
        assert code == 2 and printed.err.count("s2srm: error:") == 1, printed.err
        return {"error": printed.err}
    return json.loads(printed.out)


@pytest.mark.parametrize("text", ["--- a", "-5 + 3", "--plain", "--json=x", "null", "a\\nb"])
def test_any_text_is_a_prompt_and_a_response(root, capsys, text):
    argv = ["--max_new_tokens", "2"]
    found = correct(root / "rm", capsys, "--prompt", text, "--response", text, *argv)
    assert found["prompt"] == text and found["tokens"]


def test_one_text_may_come_from_a_pipe(root, capsys, monkeypatch):
    for missing, given in (("response", "prompt"), ("prompt", "response")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a b\n"))
        found = correct(root / "rm", capsys, f"--{given}", "c", "--max_new_tokens", "2")
        assert found["prompt"] == ("a b" if missing == "prompt" else "c")


@pytest.mark.parametrize(
    ("argv", "piped", "message"),
    [
        ([], "a", "prompt and response are missing"),
        (["--prompt", "a"], "", "response is missing"),
        (["--prompt", "a", "--response", ""], "b", "the response is empty"),
        (["--prompt", " ", "--response", "a"], "b", "the prompt is empty"),
        (["--prompt", "a", "--response=\udcff"], "", "the response is not valid UTF-8"),
        (["--prompt", "a", "--response"], "", "--response: its value is missing"),
    ],
)
def test_what_is_missing_is_named_before_the_model_is_loaded(
    root, capsys, monkeypatch, argv, piped, message
):
    monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
    monkeypatch.setattr(feedback, "load_causal_lm", lambda *a, **k: pytest.fail("loaded"))
    assert message in correct(root / "rm", capsys, *argv)["error"]


def test_the_end_of_input_on_a_terminal_is_no_traceback(root, capsys, monkeypatch):
    terminal = io.StringIO("")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "prompt is missing" in correct(root / "rm", capsys)["error"]


def test_the_default_length_is_cut_to_the_positions_left(root, capsys, caplog):
    found = correct(root / "short", capsys, "--prompt", "a b", "--response", "c")
    assert len(found["correction_tokens"]) <= 19, "2 + 1 + 2 of 24 are read"
    assert "corrections of at most 19 tokens" in caplog.text


def test_a_length_that_does_not_fit_names_the_largest_that_does(root, capsys, monkeypatch):
    monkeypatch.setattr(feedback, "load_causal_lm", lambda *a, **k: pytest.fail("loaded"))
    argv = ["--prompt", "a b", "--response", "c", "--max_new_tokens"]
    assert "at most 19 fits" in correct(root / "short", capsys, *argv, "20")["error"]
    long = ["--prompt", "a " * 30, "--response", "c"]
    error = correct(root / "short", capsys, *long)["error"]
    assert "prompt (30 tokens)" in error and "over the 24 of rm" in error


def test_a_home_folder(root, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    argv = ["--prompt", "a", "--response", "b", "--max_new_tokens", "2"]
    assert correct(Path("~/rm"), capsys, *argv)["response"]
