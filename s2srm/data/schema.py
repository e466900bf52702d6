"""A row as it is read, and what it becomes before it is tokenised.

Left out: scores, tags and every other column; a row is its texts and the place it came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Row:
    """One row as it was read. error says why it could not be read; data is empty then."""

    source: str
    place: str
    data: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def where(self) -> str:
        """file:12, or file.parquet row 12."""
        return self.source + self.place


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; role is system, user or assistant."""

    role: str
    content: str


PromptText = str | tuple[Message, ...]
"""A prompt as text, or as the turns of a conversation that the response continues."""


@dataclass(frozen=True)
class Preference:
    """A preference triple (x, y_w, y_l). where names its origin, as "file:line" or "name row N"."""

    prompt: PromptText
    chosen: str
    rejected: str
    where: str


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response to imitate."""

    prompt: PromptText
    response: str
    where: str


@dataclass(frozen=True)
class Prompt:
    """A prompt alone, for sampling."""

    prompt: PromptText
    where: str


@dataclass(frozen=True)
class LoadReport:
    """Rows read, how many of them were bad (and skipped), and why the first of those was."""

    num_rows: int
    num_bad: int
    first_bad_reason: str | None


Need = Literal["preference", "demonstration", "prompt"]
"""Which parts of a row are wanted; columns that are not wanted need not exist."""
