"""From files to triples, demonstrations and prompts: errors with a place, skips with a count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from small_tokenizers import SHARED

from s2srm.config import DataConfig
from s2srm.data.loading import load_demonstrations, load_preferences, load_prompts
from s2srm.data.schema import Demonstration, Message, Preference, Prompt
from s2srm.data.templates import plain_dialogue
from s2srm.errors import UserError

GOOD = {"prompt": "Hi", "chosen": "Hello", "rejected": "What"}


def write(path: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


BAD = {
    "broken": (
        '{"prompt": "Hi", "chosen": "He',
        "not valid JSON (Unterminated string starting at column 28)",
    ),
    "empty": (GOOD | {"chosen": ""}, "column 'chosen' is empty"),
    "null": (GOOD | {"rejected": None}, "column 'rejected' holds null, not text"),
    "type": (GOOD | {"prompt": 7}, "column 'prompt' holds int, not text: 7"),
    "left out": ({"prompt": "Hi", "chosen": "Hello"}, "column 'rejected' is missing"),
    "same": (GOOD | {"rejected": "Hello"}, "chosen and rejected are the same text"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_row_is_an_error_with_its_line_or_counted(kind: str, tmp_path: Path) -> None:
    row, reason = BAD[kind]
    path = write(tmp_path / "a.jsonl", [GOOD, "", row, GOOD])
    with pytest.raises(UserError) as caught:
        load_preferences(DataConfig(path=path))
    assert str(caught.value).startswith(f"{path}:3: {reason}")
    assert "\n" not in str(caught.value)
    rows, report = load_preferences(DataConfig(path=path, on_bad_row="skip"))
    assert rows == [Preference("Hi", "Hello", "What", f"{path}:{n}") for n in (1, 4)]
    assert (report.num_rows, report.num_bad) == (3, 1)
    assert report.first_bad_reason is not None
    assert report.first_bad_reason.startswith(f"{path}:3: {reason}")


def test_the_first_row_may_be_the_bad_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["{", {"prompt": "Hi"}, GOOD])
    rows, report = load_preferences(DataConfig(path=path, on_bad_row="skip"))
    assert (len(rows), report.num_rows, report.num_bad) == (1, 3, 2)


def test_bad_rows_of_parquet_and_json_lists(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"chosen": None}, GOOD]
    parquet, listed = tmp_path / "a.parquet", tmp_path / "b.json"
    datasets.Dataset.from_list(rows).to_parquet(str(parquet))
    listed.write_text(json.dumps(rows, indent=1))
    for path, place in ((parquet, " row 1"), (listed, ":7")):
        with pytest.raises(UserError, match=f"{path.name}{place}: column 'chosen' holds null"):
            load_preferences(DataConfig(path=str(path)))
        good, report = load_preferences(DataConfig(path=str(path), on_bad_row="skip"))
        assert (len(good), report.num_bad) == (2, 1)


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_missing_column_is_named_with_those_there(tmp_path: Path, on_bad_row: Any) -> None:
    row = {"prompt": "Hi", "choosen": "Hello", "rejected": "What"}
    path = write(tmp_path / "a.jsonl", [row, row])
    with pytest.raises(UserError) as caught:
        load_preferences(DataConfig(path=path, on_bad_row=on_bad_row))
    assert str(caught.value) == (
        f"{path}: no column 'chosen', which format columns needs; "
        "found 'prompt', 'choosen', 'rejected'; did you mean 'choosen'? "
        "(--data.columns.chosen choosen)"
    )


def test_two_columns_are_enough_for_prompts_and_demonstrations(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "Hi", "response": "Hello"}])
    assert load_prompts(DataConfig(path=path))[0] == [Prompt("Hi", f"{path}:1")]
    wanted = [Demonstration("Hi", "Hello", f"{path}:1")]
    assert load_demonstrations(DataConfig(path=path), "response")[0] == wanted
    with pytest.raises(UserError, match="no column 'chosen'"):
        load_demonstrations(DataConfig(path=path), "chosen")
    with pytest.raises(UserError, match="no column 'chosen'"):
        load_preferences(DataConfig(path=path))


def test_demonstrations_do_not_read_the_rejected_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD | {"rejected": None}, GOOD | {"rejected": "Hello"}])
    assert len(load_demonstrations(DataConfig(path=path))[0]) == 2


def test_limit_counts_good_rows_and_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, "{", GOOD, GOOD, "{"])
    rows, report = load_preferences(DataConfig(path=path, limit=2, on_bad_row="skip"))
    assert ([r.where[-1] for r in rows], report.num_rows, report.num_bad) == (["1", "3"], 3, 1)
    with pytest.raises(UserError, match="limit must be at least 1, got 0"):
        load_preferences(DataConfig(path=path, limit=0))


def test_nothing_to_use(tmp_path: Path) -> None:
    empty, bad = write(tmp_path / "a.jsonl", []), write(tmp_path / "b.jsonl", ["{", "["])
    with pytest.raises(UserError, match="gives nothing to use: it has no rows"):
        load_preferences(DataConfig(path=empty))
    with pytest.raises(UserError, match=r"2 rows, all bad; the first: .*b\.jsonl:1: not valid"):
        load_preferences(DataConfig(path=bad, on_bad_row="skip"))


def test_texts_are_kept_to_the_character(tmp_path: Path) -> None:
    row = {"prompt": " \r\nHi\u00a0", "chosen": "é🙂\u2028\x00", "rejected": "<|im_end|> "}
    path = write(tmp_path / "a.jsonl", [row])
    (found,), _ = load_preferences(DataConfig(path=path))
    assert (found.prompt, found.chosen, found.rejected) == tuple(row.values())


@pytest.mark.parametrize("name", ["hh_harmless", "hh_helpful", "polite"])
def test_real_rows(name: str) -> None:
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"shared/data/{name} not beside the checkout")
    lines = (folder / "dev.jsonl").read_text(encoding="utf-8").split("\n")
    raw = [json.loads(line) for line in lines if line]
    rows, report = load_preferences(DataConfig(path=str(folder), split="dev"))
    assert (report.num_rows, report.num_bad, len(rows)) == (len(raw), 0, len(raw))
    for row, source in zip(rows, raw, strict=True):
        is_text = isinstance(row.prompt, str)
        text = row.prompt if isinstance(row.prompt, str) else plain_dialogue(row.prompt)
        assert is_text == (name == "polite")
        assert (text, row.chosen, row.rejected) == tuple(source.values())


def test_speakers_alternate_in_every_real_dialogue() -> None:
    folder = SHARED / "data" / "hh_harmless"
    if not folder.is_dir():
        pytest.skip("shared/data/hh_harmless not beside the checkout")
    for row in load_prompts(DataConfig(path=str(folder)))[0]:
        assert not isinstance(row.prompt, str)
        roles = [message.role for message in row.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_real_summaries_as_demonstrations() -> None:
    file = SHARED / "data" / "summarization" / "samsum.jsonl"
    if not file.is_file():
        pytest.skip("shared/data/summarization not beside the checkout")
    cfg = DataConfig(path=str(file), columns={"response": "reference"}, limit=20)
    rows, _ = load_demonstrations(cfg, "response")
    assert len(rows) == 20
    assert all(row.prompt.startswith("Summarize:") for row in rows if isinstance(row.prompt, str))


def test_messages_come_through_parquet(tmp_path: Path) -> None:
    turn = {"role": "user", "content": "Hi"}
    row = {
        "chosen": [turn, {"role": "assistant", "content": "Hello"}],
        "rejected": [turn, {"role": "assistant", "content": "What"}],
    }
    file = tmp_path / "train.parquet"
    datasets.Dataset.from_list([row]).to_parquet(str(file))
    (found,), _ = load_preferences(DataConfig(path=str(tmp_path)))
    wanted = Preference((Message("user", "Hi"),), "Hello", "What", f"{file} row 0")
    assert found == wanted
