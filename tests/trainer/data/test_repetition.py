"""Prompts that stand in the responses as well: refused, taken out, or kept, as is asked."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from s2srm.config import DataConfig
from s2srm.data.loading import load_demonstrations, load_preferences
from s2srm.errors import UserError

PROMPT = "Name a colour."


def write(folder: Path, *rows: tuple[str, str, str]) -> str:
    path = folder / "a.jsonl"
    keys = ("prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps(dict(zip(keys, r, strict=True))) + "\n" for r in rows))
    return str(path)


@pytest.mark.parametrize("before", ["", " ", "### Human: ", "<|im_start|>user\n"])
def test_the_prompt_in_both_responses_is_refused(tmp_path: Path, before: str) -> None:
    start = before + PROMPT
    path = write(tmp_path, (PROMPT, start + " Blue.", start + "\nNo."))
    for load in (load_preferences, load_demonstrations):
        with pytest.raises(UserError, match=r"in 1 of 1 rows .*data.prompt_in_response: strip"):
            load(DataConfig(path=path))
        load(DataConfig(path=path, prompt_in_response="keep"))


def test_strip_keeps_the_rest_to_the_character(tmp_path: Path) -> None:
    path = write(tmp_path, (PROMPT, PROMPT + " Blue. ", PROMPT + "\n  No."))
    cfg = DataConfig(path=path, prompt_in_response="strip")
    (row,), _ = load_preferences(cfg)
    assert (row.chosen, row.rejected) == ("Blue. ", "\n  No.")
    (row,), _ = load_demonstrations(cfg)
    assert row.response == "Blue. "
    path = write(tmp_path, (PROMPT, PROMPT + " Blue.", "No."))
    with pytest.raises(UserError, match=r"a\.jsonl:1: a response does not begin with its prompt"):
        load_preferences(DataConfig(path=path, prompt_in_response="strip"))


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Hi", "High five", "Hits"),
        ("Hi", "Oh Hi you", "Well Hi you"),
        (PROMPT, PROMPT + " Blue.", "No."),
        (PROMPT, PROMPT, PROMPT + " "),
    ],
)
def test_no_repetition(tmp_path: Path, prompt: str, chosen: str, rejected: str) -> None:
    (row,), _ = load_preferences(DataConfig(path=write(tmp_path, (prompt, chosen, rejected))))
    assert (row.chosen, row.rejected) == (chosen, rejected)


def test_a_few_rows_are_kept_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [(PROMPT, "Blue.", "No.")] * 2 + [(PROMPT, PROMPT + " Blue.", PROMPT + " No.")]
    with caplog.at_level(logging.INFO, logger="s2srm"):
        assert len(load_preferences(DataConfig(path=write(tmp_path, *rows)))[0]) == 3
    assert "in 1 of 3 rows" in caplog.messages[-1]
