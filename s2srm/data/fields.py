"""Checked access to the fields of a row; each function raises BadRow with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2srm.data.schema import Message, PromptText

Fields = Mapping[str, Any]

_ROLES = ("system", "user", "assistant")


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason, without the place."""


def text_of(row: Fields, column: str, path: str = "") -> str:
    """A column's text: there, a string, not empty, and valid Unicode."""
    what = f"column {path + column!r}"
    if column not in row:
        raise BadRow(f"{what} is missing")
    value = row[column]
    if not isinstance(value, str):
        raise BadRow(f"{what} holds {kind(value)}, not text{_shown(value)}")
    if not value.strip():
        raise BadRow(f"{what} is empty")
    _check_unicode(value, what)
    return value


def zero_or_one(row: Fields, column: str) -> int:
    """The number, 0 or 1, of the preferred response."""
    value = row.get(column)
    if isinstance(value, bool) or value not in (0, 1):
        raise BadRow(f"column {column!r} must be 0 or 1, not {kind(value)}{_shown(value)}")
    return int(value)


def prompt_of(row: Fields, column: str) -> PromptText:
    """A prompt, as text or as a list of messages."""
    if isinstance(row.get(column), list):
        return _messages(row[column], column)
    return text_of(row, column)


def response_of(row: Fields, column: str) -> tuple[tuple[Message, ...], str]:
    """A response as text, or as the last of a list of messages together with those before it."""
    if not isinstance(row.get(column), list):
        return (), text_of(row, column)
    messages = _messages(row[column], column)
    if messages[-1].role != "assistant":
        raise BadRow(f"the last message of {column!r} is from {messages[-1].role!r}")
    if not messages[-1].content.strip():
        raise BadRow(f"the last message of {column!r} is empty")
    return messages[:-1], messages[-1].content


def pair_of(row: Fields, prompt: str, chosen: str, rejected: str) -> tuple[PromptText, str, str]:
    """Text or messages; messages before the last one are the prompt and must be the same."""
    lead, better = response_of(row, chosen)
    other_lead, worse = response_of(row, rejected)
    if lead != other_lead:
        raise BadRow(f"columns {chosen!r} and {rejected!r} differ before their last message")
    return lead or prompt_of(row, prompt), better, worse


def kind(value: Any) -> str:
    """Name of a value's type, as JSON's null where there is none."""
    return "null" if value is None else type(value).__name__


def _messages(value: list[Any], column: str) -> tuple[Message, ...]:
    if not value:
        raise BadRow(f"column {column!r} is an empty list of messages")
    turns: list[Message] = []
    for number, item in enumerate(value):
        place = f"{column}[{number}]"
        if not isinstance(item, Mapping):
            raise BadRow(f"{place} is {kind(item)}, not an object with role and content")
        role, content = item.get("role"), item.get("content")
        if role not in _ROLES:
            raise BadRow(f"{place}.role is {role!r:.40}, not one of {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise BadRow(f"{place}.content holds {kind(content)}, not text")
        _check_unicode(content, f"{place}.content")
        turns.append(Message(role, content))
    if not any(turn.content.strip() for turn in turns):
        raise BadRow(f"column {column!r} holds messages without text")
    return tuple(turns)


def _check_unicode(text: str, what: str) -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} holds half a surrogate pair at character {error.start}") from None


def _shown(value: Any) -> str:
    return "" if value is None else f": {value!r:.40}"
