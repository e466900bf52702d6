"""Messages in every form, and how they join with a prompt, a system turn and a history."""

from __future__ import annotations

from typing import Any

import pytest

from s2srm.data.adapters import make_adapter
from s2srm.data.fields import BadRow
from s2srm.data.messages import response_of
from s2srm.data.schema import Message

Item = dict[str, Any]


def system(text: str) -> Item:
    return {"role": "system", "content": text}


def user(text: str) -> Item:
    return {"role": "user", "content": text}


def assistant(text: str) -> Item:
    return {"role": "assistant", "content": text}


def share(speaker: str, text: str) -> Item:
    return {"from": speaker, "value": text}


def preference(row: Item) -> tuple[list[tuple[str, str]] | str, str, str]:
    """What the row gives, after a check that demonstrations and prompts agree with it."""
    adapter = make_adapter("auto", {}, list(row), row)
    prompt, chosen, rejected = adapter.preference(row)
    assert adapter.demonstration(row, "chosen") == (prompt, chosen)
    assert adapter.prompt(row) == prompt
    return shown(prompt), chosen, rejected


def shown(prompt: str | tuple[Message, ...]) -> list[tuple[str, str]] | str:
    return prompt if isinstance(prompt, str) else [(m.role[0], m.content) for m in prompt]


HI = [("u", "Hi")]
PIRATE = [("s", "Pirate"), ("u", "Hi")]
ANN = [("u", "I am Ann"), ("a", "Noted"), ("u", "Hi")]
TEXTS = {"chosen": "x", "rejected": "y"}
WHOLE = {"chosen": [user("Hi"), assistant("x")], "rejected": [user("Hi"), assistant("y")]}
ALONE = {"chosen": assistant("x"), "rejected": assistant("y")}
LONG = [user("I am Ann"), assistant("Noted"), user("Hi")]
WHOLE_LONG = {"chosen": [*LONG, assistant("x")], "rejected": [*LONG, assistant("y")]}
OTHER = [user("Ho"), assistant("y")]
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: x", "rejected": "\n\nHuman: Hi\n\nAssistant: y"}
PKU = {"response_0": "y", "response_1": "x", "better_response_id": 1}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        # The prompt stands in chosen as well, or in one of them only.
        ({"prompt": "Hi", **WHOLE}, HI),
        ({"prompt": [user("Hi")], **WHOLE}, HI),
        ({"prompt": "Hi ", **HH}, HI),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", **HH}, HI),
        ({"prompt": "\n\nHuman: Hi", **HH}, HI),
        ({"prompt": "\n\nHuman: Hi", **TEXTS}, HI),
        ({"prompt": "Hi", "chosen": HH["chosen"], "rejected": "y"}, HI),
        ({"prompt": "Hi", "chosen": WHOLE["chosen"], "rejected": "y"}, HI),
        # A system turn or earlier turns stand in one of them.
        ({"prompt": [system("Pirate"), user("Hi")], **WHOLE}, PIRATE),
        ({"prompt": LONG, **WHOLE}, ANN),
        ({"prompt": "Hi", **WHOLE_LONG}, ANN),
        ({"prompt": "I am Ann", **WHOLE_LONG}, ANN),
        # A completion of several turns.
        (
            {
                "prompt": LONG[:1],
                "chosen": [*LONG[1:], assistant("x")],
                "rejected": [*LONG[1:], assistant("y")],
            },
            ANN,
        ),
        # Columns beside the prompt, in every format.
        ({"system": "Pirate", "prompt": "Hi", **TEXTS}, PIRATE),
        ({"system_prompt": "Pirate", "question": "Hi", **TEXTS}, PIRATE),
        ({"system": "Pirate", "prompt": [system("Pirate"), user("Hi")], **TEXTS}, PIRATE),
        ({"system": "Pirate", **WHOLE}, PIRATE),
        ({"system": "Pirate", **HH}, PIRATE),
        ({"system": "Pirate", "prompt": "Hi", **PKU}, PIRATE),
        ({"system": None, "history": [], "prompt": "Hi", **TEXTS}, "Hi"),
        ({"system": " ", "prompt": "Hi", **TEXTS}, "Hi"),
        ({"history": [["I am Ann", "Noted"]], "instruction": "Hi", "input": "", **TEXTS}, ANN),
        ({"history": LONG[:2], "prompt": "Hi", **TEXTS}, ANN),
        ({"history": LONG[:2], "prompt": LONG, **TEXTS}, ANN),
        ({"history": LONG[:2], **WHOLE}, ANN),
        ({"history": LONG[:2], **WHOLE_LONG}, ANN),
        ({"instruction": "Hi", "input": "there", **TEXTS}, "Hi\nthere"),
        # ShareGPT; one message alone; lists of columns, as Arrow holds them.
        ({"conversations": [share("human", "Hi")], "system": "Pirate", **ALONE}, PIRATE),
        ({"messages": LONG, "chosen": share("gpt", "x"), "rejected": share("gpt", "y")}, ANN),
        (
            {
                "chosen": {"role": ["user", "assistant"], "content": ["Hi", "x"]},
                "rejected": {"role": ["user", "assistant"], "content": ["Hi", "y"]},
            },
            HI,
        ),
    ],
)
def test_what_belongs_to_the_prompt(row: Item, prompt: Any) -> None:
    assert preference(row) == (prompt, "x", "y")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Ho", **WHOLE}, r"of 'chosen' differ: turn 1 is user 'Ho' and user 'Hi'"),
        ({"prompt": "Ho", **HH}, r"of 'chosen' differ: turn 1 is user 'Ho' and user 'Hi'"),
        ({"prompt": LONG, **WHOLE, "rejected": OTHER}, "of 'rejected' differ"),
        ({**WHOLE, "rejected": "y"}, "last message: turn 1 is user 'Hi' and none"),
        ({"system": "Cat", "prompt": [system("Dog"), user("Hi")], **TEXTS}, "different system"),
        (
            {"system": "Cat", "system_prompt": "Dog", "prompt": "Hi", **TEXTS},
            "hold different texts",
        ),
        ({"system": ["Cat"], "prompt": "Hi", **TEXTS}, "'system' holds list, not text"),
        ({"history": "Ann", "prompt": "Hi", **TEXTS}, "'history' holds no list of earlier turns"),
        ({"history": [["a", "b", "c"]], "prompt": "Hi", **TEXTS}, r"history\[0\] is not a pair"),
        ({"prompt": LONG[:2], **TEXTS}, "is from 'assistant'; a prompt ends with the user"),
        ({"prompt": [user("a"), system("b"), user("c")], **TEXTS}, "can only be the first message"),
        ({"prompt": "Hi", "chosen": "x", "rejected": ["y", "z"]}, "a list of 2 texts"),
    ],
)
def test_what_contradicts_is_a_bad_row(row: Item, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        make_adapter("auto", {}, list(row), row).preference(row)


def test_a_whole_dialogue_is_no_response_of_plain_columns() -> None:
    row = {"prompt": "Hi", **HH}
    with pytest.raises(BadRow, match=r"data\.format anthropic_hh takes its last turn"):
        make_adapter("columns", {}, list(row), row).preference(row)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_messages_alone(column: str) -> None:
    """The last turn is the response; as prompts, messages lose it or end with the user's turn."""
    row = {column: [system("Pirate"), user("Hi"), assistant("x")]}
    adapter = make_adapter("auto", {}, list(row), row)
    for response_column in ("chosen", "response"):
        prompt, response = adapter.demonstration(row, response_column)
        assert (shown(prompt), response) == (PIRATE, "x")
    assert shown(adapter.prompt(row)) == PIRATE
    assert shown(adapter.prompt({column: row[column][:-1]})) == PIRATE
    with pytest.raises(BadRow, match=f"last message of '{column}' is from 'user'"):
        adapter.demonstration({column: row[column][:-1]}, "chosen")
    with pytest.raises(BadRow, match="no turn before the response"):
        adapter.demonstration({column: row[column][-1:]}, "chosen")
    for value in ("Hi", None):
        with pytest.raises(BadRow, match=f"'{column}' holds .*, not a list of messages"):
            adapter.demonstration({column: value}, "chosen")


@pytest.mark.parametrize("role", ["assistant", "Assistant", "gpt", "ChatGPT", "bot", "model"])
def test_names_of_roles(role: str) -> None:
    row = {"m": [share("human", "Hi"), {"role": role, "content": "x"}]}
    assert response_of(row, "m") == ((Message("user", "Hi"),), "x")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "tool", "content": "x"}, r"m\[1\].role is 'tool'.*tools are not read"),
        ({"role": "npc", "content": "x"}, "role is 'npc', not one of user, assistant, system$"),
        (share("observation", "x"), r"m\[1\].from is 'observation'"),
        ({**assistant("x"), "tool_calls": [{"id": 1}]}, "'tool_calls' beside its text"),
        ({**assistant("x"), "reasoning_content": "hm"}, "'reasoning_content' beside its text"),
        (
            assistant([{"type": "image_url"}]),
            r"content\[0\] is 'image_url'; only parts",
        ),
        (assistant(["x"]), r"content\[0\] is 'str'"),
    ],
)
def test_messages_that_would_lose_something(message: Item, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        response_of({"m": [user("Hi"), message]}, "m")


def test_parts_of_text_and_empty_turns() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"m": [user("Hi"), {**assistant(""), "content": parts, "tool_calls": None}]}
    assert response_of(row, "m")[1] == "ab"
    with pytest.raises(BadRow, match=r"m\[1\], from 'assistant', is empty"):
        response_of({"m": [user("Hi"), assistant(" "), user("Ho"), assistant("x")]}, "m")
    with pytest.raises(BadRow, match="lists of different lengths"):
        response_of({"m": {"role": ["user", "assistant"], "content": ["Hi"]}}, "m")
