"""Checked access to the fields of a row; each function raises BadRow with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]


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
    check_unicode(value, what)
    return value


def optional_text(row: Fields, column: str) -> str | None:
    """A column's text, or None where it is missing, null or blank."""
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return text_of(row, column)


def zero_or_one(row: Fields, column: str) -> int:
    """The number, 0 or 1, of the preferred response."""
    value = row.get(column)
    if isinstance(value, bool) or value not in (0, 1):
        raise BadRow(f"column {column!r} must be 0 or 1, not {kind(value)}{_shown(value)}")
    return int(value)


def kind(value: Any) -> str:
    """Name of a value's type, as JSON's null where there is none."""
    return "null" if value is None else type(value).__name__


def check_unicode(text: str, what: str) -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} holds half a surrogate pair at character {error.start}") from None


def _shown(value: Any) -> str:
    return "" if value is None else f": {value!r:.40}"
