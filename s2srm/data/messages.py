"""Lists of messages, in the forms that data sets have them, and how they join to one prompt.

    [{"role": "user", "content": "Hi"}, ...]         OpenAI, TRL
    [{"from": "human", "value": "Hi"}, ...]          ShareGPT
    {"role": ["user", ...], "content": ["Hi", ...]}  a Sequence of structs, as Arrow holds it
    {"role": "assistant", "content": "Hi"}           one message alone

A content may be text or a list of parts of type text. What would be lost without a word is
refused: tools, images, thoughts beside the content. Left out: joining turns of one speaker in a
row; whether a chat may hold such is for its template to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from s2srm.data.fields import BadRow, Fields, check_unicode, kind, text_of
from s2srm.data.schema import Message, PromptText

Turns = tuple[Message, ...]

_ROLE_KEYS = ("role", "from", "speaker")
_TEXT_KEYS = ("content", "value", "text")
_ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "model", "chatgpt", "chatbot"),
    "system": ("system", "developer"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_BESIDE_THE_TEXT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def holds_messages(value: Any) -> bool:
    """True for a list, and for an object that is one message or a column-wise list of them."""
    if isinstance(value, Mapping):
        return any(key in value for key in _ROLE_KEYS)
    return isinstance(value, list)


def turns_of(row: Fields, column: str) -> Turns:
    """The messages of a column; only the last one may be empty."""
    items = _items(row[column], column)
    if not items:
        raise BadRow(f"column {column!r} is an empty list of messages")
    turns = tuple(_message(item, f"{column}[{n}]", n) for n, item in enumerate(items))
    if not any(turn.content.strip() for turn in turns):
        raise BadRow(f"column {column!r} holds messages without text")
    for number, turn in enumerate(turns[:-1]):
        if turn.role != "system" and not turn.content.strip():
            raise BadRow(f"{column}[{number}], from {turn.role!r}, is empty")
    return turns


def prompt_of(row: Fields, column: str) -> PromptText:
    """A prompt, as text or as messages that end in a user's turn with text."""
    if not holds_messages(row.get(column)):
        return text_of(row, column)
    turns = turns_of(row, column)
    if turns[-1].role != "user":
        raise BadRow(
            f"the last message of {column!r} is from {turns[-1].role!r}; a prompt ends with the "
            "user's turn"
        )
    if not turns[-1].content.strip():
        raise BadRow(f"the last message of {column!r} is empty")
    return turns


def response_of(row: Fields, column: str) -> tuple[Turns, str]:
    """A response as text, or as the last of a list of messages together with those before it."""
    value = row.get(column)
    if not holds_messages(value):
        return (), text_of(row, column)
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        raise BadRow(
            f"column {column!r} holds a list of {len(value)} texts; one is needed: text, or "
            "messages with role and content"
        )
    turns = turns_of(row, column)
    if turns[-1].role != "assistant":
        raise BadRow(f"the last message of {column!r} is from {turns[-1].role!r}")
    if not turns[-1].content.strip():
        raise BadRow(f"the last message of {column!r} is empty")
    return turns[:-1], turns[-1].content


def in_context(prompt: PromptText, system: str | None, history: Turns) -> PromptText:
    """The prompt after a system turn and earlier turns that stand in columns of their own."""
    if system is None and not history:
        return prompt
    own_system, turns = _split_system(as_turns(prompt))
    given = () if system is None else (Message("system", system),)
    if list(map(_bare, turns[: len(history)])) == list(map(_bare, history)):
        history = ()
    return (*_one_system(given, own_system, "the system column and the prompt"), *history, *turns)


def join(prompt: PromptText, lead: Turns, column: str) -> PromptText:
    """What comes before the response: the prompt, and the messages before the last of a column.

    Each may hold all of it, or the end of it (a system turn or a history in one only), or the
    column goes on after the prompt with an assistant's turn. BadRow where they contradict.
    """
    if not lead:
        return prompt
    prompt_system, asked = _split_system(as_turns(prompt))
    lead_system, before = _split_system(lead)
    system = _one_system(prompt_system, lead_system, f"the prompt and column {column!r}")
    return (*system, *_overlap(asked, before, isinstance(prompt, str), column))


def first_difference(one: Sequence[Message], other: Sequence[Message]) -> str:
    """`turn 2 is user 'a' and user 'b'`: where two lists of turns part."""
    for number in range(max(len(one), len(other))):
        shown = [
            f"{turns[number].role} {turns[number].content!r:.40}" if number < len(turns) else "none"
            for turns in (one, other)
        ]
        if shown[0] != shown[1] or one[number] != other[number]:
            return f"turn {number + 1} is {shown[0]} and {shown[1]}"
    return "they are the same"


def as_turns(prompt: PromptText) -> Turns:
    """A prompt as turns: text is the user's."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def _overlap(asked: Turns, before: Turns, is_text: bool, column: str) -> Turns:
    one, other = [list(map(_bare, turns)) for turns in (asked, before)]
    if one in (other[: len(one)], other[-len(one) :]):
        return before
    if not before or other == one[-len(other) :]:
        return asked
    if is_text and one[0] in other:
        return before
    if before[0].role == "assistant":
        return (*asked, *before)
    raise BadRow(
        f"the prompt and the messages before the last of {column!r} differ: "
        f"{first_difference(asked, before)}"
    )


def _bare(message: Message) -> tuple[str, str]:
    return message.role, message.content.strip()


def _split_system(turns: Turns) -> tuple[Turns, Turns]:
    count = 1 if turns and turns[0].role == "system" else 0
    return turns[:count], turns[count:]


def _one_system(one: Turns, other: Turns, what: str) -> Turns:
    if one and other and _bare(one[0]) != _bare(other[0]):
        raise BadRow(
            f"{what} have different system turns: {one[0].content!r:.40} and "
            f"{other[0].content!r:.40}"
        )
    return one or other


def _items(value: Any, column: str) -> list[Any]:
    if isinstance(value, list):
        return value
    lists = {key: part for key, part in value.items() if isinstance(part, list)}
    role = _first(value, _ROLE_KEYS)
    if role not in lists:
        return [value]
    lengths = {key: len(part) for key, part in lists.items()}
    if len(set(lengths.values())) > 1:
        raise BadRow(f"column {column!r} holds lists of different lengths: {lengths}")
    return [{key: part[n] for key, part in lists.items()} for n in range(lengths[role])]


def _first(item: Fields, keys: Sequence[str]) -> str:
    return next((key for key in keys if item.get(key) is not None), keys[0])


def _message(item: Any, place: str, number: int) -> Message:
    if not isinstance(item, Mapping):
        raise BadRow(f"{place} is {kind(item)}, not an object with role and content")
    role_key, text_key = _first(item, _ROLE_KEYS), _first(item, _TEXT_KEYS)
    name = item.get(role_key)
    role = _ROLE_OF.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        tool = "; conversations with tools are not read" if name in _TOOL_ROLES else ""
        raise BadRow(f"{place}.{role_key} is {name!r:.40}, not one of {', '.join(_ROLES)}{tool}")
    for key in _BESIDE_THE_TEXT:
        if item.get(key):
            raise BadRow(f"{place} has {key!r} beside its text, which is not read")
    if role == "system" and number > 0:
        raise BadRow(f"{place} is a system turn, which can only be the first message")
    return Message(role, _content(item.get(text_key), f"{place}.{text_key}"))


def _content(value: Any, what: str) -> str:
    if isinstance(value, list):
        for number, part in enumerate(value):
            text = part.get("text") if isinstance(part, Mapping) else None
            if not isinstance(text, str) or part.get("type", "text") != "text":
                shown = part.get("type") if isinstance(part, Mapping) else kind(part)
                raise BadRow(f"{what}[{number}] is {shown!r:.40}; only parts of type text are read")
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadRow(f"{what} holds {kind(value)}, not text")
    check_unicode(value, what)
    return value
