"""Each format's columns, in the shapes that the real data sets have."""

from __future__ import annotations

from typing import Any

import pytest

from s2srm.data.adapters import detect, make_adapter
from s2srm.data.fields import BadRow
from s2srm.data.schema import Message
from s2srm.errors import UserError

PKU = {
    "prompt": "How do I do it?",
    "response_0": "No.",
    "response_1": "Like this.",
    "better_response_id": 1,
    "safer_response_id": 0,
}
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More\n\nAssistant: Sure: \n\n1. this",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More\n\nAssistant: No.",
}
HH_PROMPT = {
    "prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More\n\nAssistant:",
    "chosen": "Sure",
    "rejected": "No",
}
HH_TURNS = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "More"))
TLDR = {
    "info": {
        "id": "t3",
        "post": "I fell.\n",
        "title": "Help",
        "subreddit": "running",
        "site": None,
    },
    "summaries": [{"text": " Fell.", "policy": "a"}, {"text": " I fell while running.", "note": 1}],
    "choice": 1,
    "split": "train",
}
TURN = {"role": "user", "content": "Hi"}
ULTRA = {
    "prompt": "Hi",
    "prompt_id": "00ff",
    "chosen": [TURN, {"role": "assistant", "content": "Hello"}],
    "rejected": [TURN, {"role": "assistant", "content": "What"}],
    "score_chosen": 8.0,
}
PLAIN = {"prompt": "Hi", "chosen": "Hello", "rejected": "What"}


def adapt(row: dict[str, Any], data_format: str = "auto", names: dict[str, str] | None = None):
    return make_adapter(data_format, names or {}, list(row), row)


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        (PKU, "pku_saferlhf", ("How do I do it?", "Like this.", "No.")),
        (HH, "anthropic_hh", (HH_TURNS, "Sure: \n\n1. this", "No.")),
        (HH_PROMPT, "anthropic_hh", (HH_TURNS, "Sure", "No")),
        (
            TLDR,
            "tldr_comparisons",
            (
                "SUBREDDIT: r/running\n\nTITLE: Help\n\nPOST: I fell.\n\nTL;DR:",
                "I fell while running.",
                "Fell.",
            ),
        ),
        (ULTRA, "ultrafeedback", ((Message("user", "Hi"),), "Hello", "What")),
        (PLAIN, "columns", ("Hi", "Hello", "What")),
    ],
)
def test_formats_are_recognised(row: dict[str, Any], name: str, expected: tuple[Any, ...]) -> None:
    adapter = adapt(row)
    assert (adapter.name, detect(list(row), row)) == (name, name)
    assert adapter.preference(row) == expected
    assert adapter.prompt(row) == expected[0]
    assert adapter.demonstration(row, "chosen") == expected[:2]
    assert set(adapter.required("preference", "chosen").values()) <= set(row)


def test_pku_by_safety() -> None:
    adapter = adapt(PKU, names={"preference": "safer_response_id"})
    assert adapter.preference(PKU)[1:] == ("No.", "Like this.")
    assert adapter.required("preference", "chosen")["preference"] == "safer_response_id"


@pytest.mark.parametrize("choice", [2, -1, None, "1", True, [0]])
def test_choice_that_is_neither_0_nor_1(choice: object) -> None:
    with pytest.raises(BadRow, match="'better_response_id' must be 0 or 1"):
        adapt(PKU).preference(PKU | {"better_response_id": choice})


def test_column_map() -> None:
    row = {"question": "Hi", "good": "Hello", "bad": "What", "gold": "Hey"}
    names = {"prompt": "question", "chosen": "good", "rejected": "bad", "response": "gold"}
    adapter = adapt(row, names=names)
    assert adapter.preference(row) == ("Hi", "Hello", "What")
    assert adapter.demonstration(row, "response") == ("Hi", "Hey")
    wanted = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert adapter.required("preference", "chosen") == wanted
    wanted = {"prompt": "question", "response": "gold"}
    assert adapter.required("demonstration", "response") == wanted
    with pytest.raises(UserError, match="unknown key 'promt'; did you mean 'prompt'"):
        adapt(row, names={"promt": "question"})


def test_columns_of_messages_with_and_without_the_prompt_in_them() -> None:
    reply = [{"role": "assistant", "content": "Hello"}]
    row = {"prompt": [TURN], "chosen": reply, "rejected": "What"}
    assert adapt(row, "columns").preference(row) == ((Message("user", "Hi"),), "Hello", "What")
    assert adapt(ULTRA, "columns").preference(ULTRA)[0] == (Message("user", "Hi"),)
    implicit = {k: ULTRA[k] for k in ("chosen", "rejected")}
    assert adapt(implicit).preference(implicit)[0] == (Message("user", "Hi"),)


def test_human_and_assistant_text_is_kept_where_columns_are_asked_for() -> None:
    assert adapt(HH_PROMPT, "columns").preference(HH_PROMPT)[0] == HH_PROMPT["prompt"]


def test_hh_turns_of_one_speaker_in_a_row_are_joined() -> None:
    prompt = "\n\nHuman: a\n\nAssistant: b\n\nAssistant:  c \n\nHuman: d\n\nAssistant:"
    messages = adapt(HH_PROMPT).prompt(HH_PROMPT | {"prompt": prompt})
    assert messages == (Message("user", "a"), Message("assistant", "b\n\nc"), Message("user", "d"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"rejected": "\n\nHuman: Bye\n\nAssistant: No"},
            "differ before their last message",
        ),
        ({"rejected": HH["chosen"] + "\n\nHuman: x"}, "does not end in an Assistant turn"),
        ({"rejected": "\n\nHuman: Hi\n\nAssistant: "}, "does not end in an Assistant turn"),
        ({"rejected": "no dialogue"}, "'rejected' is not a dialogue"),
        ({"chosen": "  "}, "'chosen' is empty"),
    ],
)
def test_bad_hh_dialogues(change: dict[str, str], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        adapt(HH).preference(HH | change)


@pytest.mark.parametrize("prompt", ["Hi", "\n\nHuman: Hi\n\nAssistant: begun"])
def test_bad_hh_prompts(prompt: str) -> None:
    with pytest.raises(BadRow, match="prompt is not a dialogue"):
        adapt(HH_PROMPT).prompt(HH_PROMPT | {"prompt": prompt})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"info": None}, "'info' holds null, not an object"),
        ({"info": TLDR["info"] | {"post": None}}, r"'info.post' holds null, not text"),
        ({"summaries": TLDR["summaries"][:1]}, "must hold a list of two"),
        ({"summaries": ["a", "b"]}, "must hold objects"),
        ({"summaries": [{"text": ""}, {"text": "a"}]}, r"'summaries\[0\].text' is empty"),
    ],
)
def test_bad_tldr_rows(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        adapt(TLDR).preference(TLDR | change)


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ([], "empty list of messages"),
        ([TURN], "last message of 'chosen' is from 'user'"),
        ([TURN, {"role": "assistant", "content": " \n"}], "last message of 'chosen' is empty"),
        ([TURN, {"role": "assistant", "content": None}], r"chosen\[1\].content holds null"),
        ([TURN, {"role": "tool", "content": "x"}], r"chosen\[1\].role is 'tool'"),
        ([TURN, {"content": "x"}], r"chosen\[1\].role is None"),
        (["Hi", "Hello"], "holds a list of 2 texts"),
        (
            [{"role": "user", "content": "Yo"}, ULTRA["chosen"][1]],
            "last of 'chosen' differ:",
        ),
        ([TURN, {"role": "assistant", "content": "\ud800"}], "half a surrogate pair"),
    ],
)
def test_bad_messages(chosen: list[Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        adapt(ULTRA).preference(ULTRA | {"chosen": chosen})


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "holds null, not text"),
        (3.5, "holds float, not text: 3.5"),
        (10**400, "holds int, not text: 1000"),
        ({"text": "x"}, "holds dict, not text: {'text': 'x'}"),
        ("", "is empty"),
        (" \r\n\t", "is empty"),
        ("a\udfff", "half a surrogate pair at character 1"),
    ],
)
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_bad_values(column: str, value: object, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        adapt(PLAIN).preference(PLAIN | {column: value})
    assert str(caught.value).startswith(f"column {column!r}")
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 120
