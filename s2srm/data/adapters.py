"""One adapter for each data format: a row's columns -> prompt, chosen and rejected.

    columns           prompt, chosen, rejected (or response), text or lists of messages; renamed by
                      data.columns
    pku_saferlhf      prompt, response_0, response_1 and better_response_id; with data.columns
                      {preference: safer_response_id} the safer response is the chosen one
    anthropic_hh      chosen and rejected as whole dialogues; or prompt, chosen, rejected with the
                      dialogue in prompt
    tldr_comparisons  info.{subreddit, title, post}, summaries[].text, choice
    ultrafeedback     chosen and rejected as lists of messages that share all but the last

Left out: scores, and picking pairs from more than two responses.
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from s2srm.data.fields import (
    BadRow,
    Fields,
    kind,
    pair_of,
    prompt_of,
    response_of,
    text_of,
    zero_or_one,
)
from s2srm.data.schema import Message, Need, PromptText
from s2srm.errors import UserError

Pair = tuple[PromptText, str, str]

_KEYS = ("prompt", "chosen", "rejected", "response", "preference")
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_HH_ROLE = {"Human": "user", "Assistant": "assistant"}
_HH_LAST = "\n\nAssistant:"


class Adapter(ABC):
    """What every format offers; prompt, preference and demonstration raise BadRow."""

    name: str
    prompt_columns: tuple[str, ...]
    pair_columns: tuple[str, ...]

    def required(self, need: Need, response_column: str) -> tuple[str, ...]:
        """Columns without which no row can be used."""
        if need == "prompt":
            return self.prompt_columns
        if need == "demonstration" and response_column != "chosen":
            return (*self.prompt_columns, response_column)
        return self.pair_columns

    @abstractmethod
    def prompt(self, row: Fields) -> PromptText:
        """The prompt alone."""

    @abstractmethod
    def preference(self, row: Fields) -> Pair:
        """Prompt, chosen, rejected."""

    def demonstration(self, row: Fields, response_column: str) -> tuple[PromptText, str]:
        """Prompt and the response to imitate: the chosen one, or the column `response`."""
        if response_column == "chosen":
            return self.preference(row)[:2]
        return self.prompt(row), text_of(row, response_column)


class Columns(Adapter):
    """Columns prompt, chosen and rejected (or response), under these or other names."""

    name = "columns"

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = {key: names.get(key, key) for key in _KEYS}
        self.prompt_columns = (self.names["prompt"],)
        self.pair_columns = tuple(self.names[key] for key in ("prompt", "chosen", "rejected"))

    def required(self, need: Need, response_column: str) -> tuple[str, ...]:
        if need == "demonstration":
            return (*self.prompt_columns, self.names[response_column])
        return super().required(need, response_column)

    def prompt(self, row: Fields) -> PromptText:
        return prompt_of(row, self.names["prompt"])

    def preference(self, row: Fields) -> Pair:
        return pair_of(row, *self.pair_columns)

    def demonstration(self, row: Fields, response_column: str) -> tuple[PromptText, str]:
        lead, response = response_of(row, self.names[response_column])
        return lead or self.prompt(row), response


class PKUSafeRLHF(Adapter):
    """Two responses and the number of the better or of the safer one."""

    name = "pku_saferlhf"
    prompt_columns = ("prompt",)

    def __init__(self, names: Mapping[str, str]) -> None:
        self.choice = names.get("preference", "better_response_id")
        self.pair_columns = ("prompt", "response_0", "response_1", self.choice)

    def prompt(self, row: Fields) -> PromptText:
        return text_of(row, "prompt")

    def preference(self, row: Fields) -> Pair:
        better = zero_or_one(row, self.choice)
        texts = [text_of(row, "response_0"), text_of(row, "response_1")]
        return self.prompt(row), texts[better], texts[1 - better]


class AnthropicHH(Adapter):
    """Dialogues written as "\\n\\nHuman: ...\\n\\nAssistant: ..."; the last turn is the response.

    The prompt becomes messages, so that a chat template can write it; the plain template writes
    it back in the same form. Turns are stripped, and two turns of one speaker in a row (a few real
    rows) are joined by an empty line, because some chat templates demand that speakers alternate.
    """

    name = "anthropic_hh"

    def __init__(self, prompt_column: bool) -> None:
        self.prompt_column = prompt_column
        self.prompt_columns = ("prompt",) if prompt_column else ("chosen",)
        lead = ("prompt",) if prompt_column else ()
        self.pair_columns = (*lead, "chosen", "rejected")

    def required(self, need: Need, response_column: str) -> tuple[str, ...]:
        if need == "demonstration":
            return tuple(c for c in (*self.pair_columns, response_column) if c != "rejected")
        return super().required(need, response_column)

    def prompt(self, row: Fields) -> PromptText:
        if self.prompt_column:
            return _hh_prompt(text_of(row, "prompt"))
        return self._dialogue(row, "chosen")[0]

    def preference(self, row: Fields) -> Pair:
        if self.prompt_column:
            return self.prompt(row), text_of(row, "chosen"), text_of(row, "rejected")
        chosen, rejected = self._dialogue(row, "chosen"), self._dialogue(row, "rejected")
        if chosen[0] != rejected[0]:
            raise BadRow("chosen and rejected differ before their last Assistant turn")
        return chosen[0], chosen[1], rejected[1]

    def demonstration(self, row: Fields, response_column: str) -> tuple[PromptText, str]:
        if self.prompt_column:
            return self.prompt(row), text_of(row, response_column)
        return self._dialogue(row, response_column)

    def _dialogue(self, row: Fields, column: str) -> tuple[tuple[Message, ...], str]:
        text = text_of(row, column)
        cut = text.rfind(_HH_LAST)
        if cut < 0 or not _is_hh(text):
            raise BadRow(f"column {column!r} is not a dialogue of 'Human:' and 'Assistant:' turns")
        response = text[cut + len(_HH_LAST) :].strip()
        if not response or "\n\nHuman:" in response:
            raise BadRow(f"column {column!r} does not end in an Assistant turn with text")
        return _hh_prompt(text[: cut + len(_HH_LAST)]), response


class TLDRComparisons(Adapter):
    """openai/summarize_from_feedback, subset comparisons; the usual TL;DR prompt."""

    name = "tldr_comparisons"
    prompt_columns = ("info",)
    pair_columns = ("info", "summaries", "choice")

    def prompt(self, row: Fields) -> PromptText:
        info = row.get("info")
        if not isinstance(info, Mapping):
            raise BadRow(f"column 'info' holds {kind(info)}, not an object")
        texts = {key: text_of(info, key, "info.").strip() for key in ("subreddit", "title", "post")}
        return (
            f"SUBREDDIT: r/{texts['subreddit']}\n\nTITLE: {texts['title']}\n\n"
            f"POST: {texts['post']}\n\nTL;DR:"
        )

    def preference(self, row: Fields) -> Pair:
        better = zero_or_one(row, "choice")
        summaries = row.get("summaries")
        if not isinstance(summaries, list) or len(summaries) != 2:
            raise BadRow("column 'summaries' must hold a list of two")
        if not all(isinstance(s, Mapping) for s in summaries):
            raise BadRow("column 'summaries' must hold objects with a field 'text'")
        texts = [text_of(s, "text", f"summaries[{i}].").strip() for i, s in enumerate(summaries)]
        return self.prompt(row), texts[better], texts[1 - better]


class UltraFeedback(Adapter):
    """Conversations as lists of messages; the last message of each is the response."""

    name = "ultrafeedback"
    prompt_columns = ("chosen",)
    pair_columns = ("chosen", "rejected")

    def prompt(self, row: Fields) -> PromptText:
        return response_of(row, "chosen")[0] or prompt_of(row, "prompt")

    def preference(self, row: Fields) -> Pair:
        return pair_of(row, "prompt", "chosen", "rejected")


def detect(columns: Sequence[str], row: Fields | None = None) -> str:
    """Format of a data set by the names of its columns and, where they leave it open, a row.

    A prompt or a chosen text that is written as Human/Assistant turns makes it anthropic_hh;
    lists of messages make it ultrafeedback; everything else is columns.
    """
    have = set(columns)
    if {"response_0", "response_1"} <= have:
        return "pku_saferlhf"
    if {"info", "summaries"} <= have:
        return "tldr_comparisons"
    lead = (row or {}).get("prompt" if "prompt" in have else "chosen")
    if isinstance(lead, str) and _is_hh(lead):
        return "anthropic_hh"
    if {"chosen", "rejected"} <= have:
        if isinstance((row or {}).get("chosen"), list) or "score_chosen" in have:
            return "ultrafeedback"
        if "prompt" not in have:
            return "anthropic_hh"
    return "columns"


def make_adapter(
    data_format: str, names: Mapping[str, str], columns: Sequence[str], row: Fields | None = None
) -> Adapter:
    """The adapter for config.DataFormat; `auto` is detected. names is data.columns."""
    for key in names:
        if key not in _KEYS:
            raise UserError(
                f"data.columns: unknown key {key!r}{did_you_mean(key, _KEYS)}; "
                f"known keys are {', '.join(_KEYS)}"
            )
    if data_format == "auto":
        data_format = "columns" if set(names) - {"preference"} else detect(columns, row)
    if data_format == "columns":
        return Columns(names)
    if data_format == "pku_saferlhf":
        return PKUSafeRLHF(names)
    if data_format == "anthropic_hh":
        return AnthropicHH("prompt" in columns)
    if data_format == "tldr_comparisons":
        return TLDRComparisons()
    if data_format == "ultrafeedback":
        return UltraFeedback()
    raise UserError(f"data.format {data_format!r} is unknown")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _is_hh(text: str) -> bool:
    return text.lstrip().startswith("Human:") and _HH_LAST in text


def _hh_prompt(text: str) -> tuple[Message, ...]:
    """A dialogue that ends in "Assistant:" -> its turns, those of one speaker in a row joined."""
    _, *pieces = _HH_TURN.split(text.strip())
    turns = [
        (_HH_ROLE[speaker], content.strip())
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if not _is_hh(text) or turns[-1] != ("assistant", ""):
        raise BadRow("prompt is not a dialogue that starts with 'Human:' and ends in 'Assistant:'")
    messages: list[Message] = []
    for role, content in turns[:-1]:
        if messages and messages[-1].role == role:
            joined = "\n\n".join(t for t in (messages[-1].content, content) if t)
            messages[-1] = Message(role, joined)
        else:
            messages.append(Message(role, content))
    if not any(m.content for m in messages):
        raise BadRow("prompt holds turns without text")
    return tuple(messages)
