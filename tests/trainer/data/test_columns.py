"""Columns by their names in common use, by data.columns, and what is said where none fits."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from s2srm.config import DataConfig
from s2srm.data.loading import load_demonstrations, load_preferences, load_prompts
from s2srm.errors import UserError

PAIR = {"chosen": "x", "rejected": "y"}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}]


def write(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["question", "instruction", "query", "input", "problem"])
def test_a_prompt_under_another_name_is_read_and_said(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, {"id": 7, name: "Hi", **PAIR})
    with caplog.at_level(logging.INFO, logger="s2srm"):
        (row,), _ = load_preferences(DataConfig(path=path))
        assert load_prompts(DataConfig(path=path))[0][0].prompt == row.prompt == "Hi"
    assert caplog.messages == [
        f"{path}: format columns reads {name}, chosen, rejected; not read: id",
        f"{path}: format columns reads {name}; not read: id, chosen, rejected",
    ]


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"utterance": "Hi", "n": 1, **PAIR}, "; --data.columns.prompt utterance reads it"),
        ({"user": "Hi", "url": "u", **PAIR}, "; --data.columns.prompt user reads it"),
        ({"a": "Hi", "b": "Ho", **PAIR}, "; --data.columns.prompt COLUMN reads it"),
        ({"promt": "Hi", **PAIR}, r"; did you mean 'promt'\? \(--data.columns.prompt promt\)"),
        ({"question": "Hi", "query": "Ho", **PAIR}, "'question' and 'query' could each be the pr"),
        (PAIR, "; without it, chosen and rejected must be messages or dialogues"),
        ({"prompt": "Hi", "winner": "x", "loser": "y"}, "; --data.columns.chosen winner reads it"),
        ({"prompt": "Hi", "completion": "x", "label": True}, "; a preference needs two responses"),
        ({"messages": TURNS}, "no column 'chosen'.*; a preference needs two responses"),
        ({"data": [{"prompt": "Hi"}]}, "column 'data' holds a list of objects"),
    ],
)
def test_missing_columns_of_preferences(row: dict[str, Any], remedy: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=remedy):
        load_preferences(DataConfig(path=write(tmp_path, row)))


def test_missing_column_of_demonstrations(tmp_path: Path) -> None:
    path = write(tmp_path, {"instruction": "Hi", "input": "", "output": "x"})
    with pytest.raises(
        UserError, match=r"response_column response --data\.columns\.response output"
    ):
        load_demonstrations(DataConfig(path=path))
    cfg = DataConfig(path=path, columns={"response": "output"})
    (row,), _ = load_demonstrations(cfg, "response")
    assert (row.prompt, row.response) == ("Hi", "x")


def test_context_columns_are_named_or_switched_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, {"persona": "Pirate", "system": "linux", "prompt": "Hi", **PAIR})
    with pytest.raises(UserError, match=r"no column 'personna'.*--data.columns.system persona"):
        load_prompts(DataConfig(path=path, columns={"system": "personna"}))
    (row,), _ = load_prompts(DataConfig(path=path, columns={"system": "persona"}))
    assert [turn.content for turn in row.prompt if not isinstance(turn, str)] == ["Pirate", "Hi"]
    caplog.clear()
    (row,), _ = load_prompts(DataConfig(path=path, columns={"system": ""}))
    assert row.prompt == "Hi"
    (record,) = caplog.records
    assert record.getMessage().endswith("may belong to the prompt: persona (see data.columns)")


@pytest.mark.parametrize("name", ["context", "input", "instruction", "tools", "messages"])
def test_a_warning_where_what_is_not_read_may_belong_to_the_prompt(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_preferences(DataConfig(path=write(tmp_path, {"prompt": "Hi", name: "Ho", **PAIR})))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith(f"may belong to the prompt: {name} (see data.columns)")


def test_a_system_turn_that_comes_late_is_read(tmp_path: Path) -> None:
    """Keys that are null may be left out of JSON rows, so the first rows do not tell."""
    rows = [{"prompt": "Hi", **PAIR}] * 150
    found, _ = load_preferences(DataConfig(path=write(tmp_path, *rows, {**rows[0], "system": "S"})))
    assert [isinstance(row.prompt, str) for row in found] == [True] * 150 + [False]


def test_bad_first_rows_do_not_decide_the_format(tmp_path: Path) -> None:
    whole = {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "y"}]}
    path = write(tmp_path, {"chosen": None, "rejected": None}, whole)
    rows, report = load_preferences(DataConfig(path=path, on_bad_row="skip"))
    assert (len(rows), report.num_bad) == (1, 1)


@pytest.mark.parametrize("name", ["history", "system", "input"])
def test_a_context_column_may_be_named_as_the_prompt(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, {name: "Hi", "question": "Ho", **PAIR})
    (row,), _ = load_preferences(DataConfig(path=path, columns={"prompt": name}))
    assert row.prompt == "Hi"


def test_renamed_columns_keep_their_format(tmp_path: Path) -> None:
    lead = "\n\nHuman: Hi\n\nAssistant:"
    path = write(tmp_path, {"p": lead, "c": lead + " x", "r": lead + " y"})
    columns = {"prompt": "p", "chosen": "c", "rejected": "r"}
    (row,), _ = load_preferences(DataConfig(path=path, columns=columns))
    assert (len(row.prompt), row.chosen, row.rejected) == (1, "x", "y")
