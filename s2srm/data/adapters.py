"""One adapter for each data format: a row's columns -> prompt, chosen and rejected.

    columns           prompt, chosen, rejected (or response), text or lists of messages; renamed by
                      data.columns; or one column of messages, whose last is the response
    pku_saferlhf      prompt, response_0, response_1 and better_response_id; with data.columns
                      {preference: safer_response_id} the safer response is the chosen one
    anthropic_hh      dialogues of "\\n\\nHuman: ...\\n\\nAssistant: ..." in prompt, or whole in
                      chosen and rejected, or both
    tldr_comparisons  info.{subreddit, title, post}, summaries[].text, choice
    ultrafeedback     chosen and rejected as lists of messages that share all but the last

In every format a column `system` is the system turn and a column `history` the turns before the
prompt. Left out: scores, and picking pairs from more than two responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from s2srm.data.base import Adapter, Pair
from s2srm.data.columns import KEYS, carries_prompt, name_columns
from s2srm.data.dialogues import (
    dialogue_prompt,
    dialogue_response,
    is_dialogue,
    is_dialogue_prompt,
)
from s2srm.data.fields import BadRow, Fields, kind, optional_text, text_of
from s2srm.data.messages import (
    Turns,
    first_difference,
    holds_messages,
    join,
    prompt_of,
    response_of,
    turns_of,
)
from s2srm.data.schema import Need, PromptText
from s2srm.data.two_responses import PKUSafeRLHF, TLDRComparisons
from s2srm.errors import UserError, did_you_mean


class Columns(Adapter):
    """Columns prompt, chosen and rejected (or response), under these or other names.

    A prompt is text or messages; a response is text, or messages of which it is the last. The
    messages before it and the prompt must agree; see messages.join. A column of messages alone
    holds prompt and response.
    """

    name = "columns"

    def required(self, need: Need, response_column: str) -> dict[str, str]:
        names = self.names
        lead = {"prompt": names.prompt} if names.prompt else {}
        if need == "preference":
            return {**lead, "chosen": names.chosen, "rejected": names.rejected}
        if need == "prompt":
            return lead or {"messages": (self._wholes() or [names.chosen])[0]}
        answer = names.answer(response_column, self.columns)
        key = "messages" if answer == names.conversation else response_column
        return {**lead, key: answer}

    def reads(self, need: Need, response_column: str) -> list[str]:
        whole = self.names.whole or self.names.conversation
        also = self._wholes() if need == "prompt" and whole else []
        return [*super().reads(need, response_column), *also]

    def prompt(self, row: Fields) -> PromptText:
        for column in self._wholes():
            if self.names.prompt is None or carries_prompt(row.get(column)):
                return self._join(row, self._turns_before_response(row, column), column)
        return self._join(row, (), self.names.chosen)

    def preference(self, row: Fields) -> Pair:
        columns = (self.names.chosen, self.names.rejected)
        parts = [self._response(row, column) for column in columns]
        leads = [lead for lead, _ in parts]
        prompts = [
            self._join(row, lead, column)
            for lead, column in zip(leads, columns, strict=True)
            if lead or not any(leads)
        ]
        compared = leads if self.names.prompt is None else prompts
        if compared[0] != compared[-1]:
            raise BadRow(
                f"columns {' and '.join(map(repr, columns))} differ before their last message: "
                f"{first_difference(*leads)}"
            )
        return prompts[0], parts[0][1], parts[1][1]

    def demonstration(self, row: Fields, response_column: str) -> tuple[PromptText, str]:
        column = self.names.answer(response_column, self.columns)
        lead, response = self._response(row, column)
        return self._join(row, lead, column), response

    def _wholes(self) -> list[str]:
        """Columns that may hold prompt and response together."""
        names = self.names
        return [c for c in (names.conversation, names.chosen, names.response) if c in self.columns]

    def _join(self, row: Fields, lead: Turns, column: str) -> PromptText:
        """The prompt from its own columns and from the turns before a response."""
        own = self.names.prompt
        if own is None:
            if not lead:
                raise BadRow(f"column {column!r} holds no turn before the response, so no prompt")
            return self.in_context(row, lead)
        if holds_messages(row.get(own)):
            return join(self.in_context(row, prompt_of(row, own)), lead, column)
        return join(self.in_context(row, self._text_prompt(row, own, lead)), lead, column)

    def _text_prompt(self, row: Fields, column: str, lead: Turns) -> PromptText:
        """A prompt that is text; lead are the turns that the response brings along."""
        text = text_of(row, column)
        more = optional_text(row, self.names.input) if self.names.input else None
        return text if more is None else f"{text}\n{more}"

    def _response(self, row: Fields, column: str) -> tuple[Turns, str]:
        """A response and the turns before it that stand in the same column."""
        if column == self.names.conversation and not holds_messages(row.get(column)):
            raise BadRow(f"column {column!r} holds {kind(row.get(column))}, not a list of messages")
        lead, text = response_of(row, column)
        if not holds_messages(row[column]) and is_dialogue(text):
            raise BadRow(
                f"column {column!r} holds a whole dialogue of 'Human:' and 'Assistant:'; "
                "data.format anthropic_hh takes its last turn for the response"
            )
        return lead, text

    def _turns_before_response(self, row: Fields, column: str) -> Turns:
        if not holds_messages(row.get(column)):
            return self._response(row, column)[0]
        turns = turns_of(row, column)
        return turns[:-1] if turns[-1].role == "assistant" else turns


class UltraFeedback(Columns):
    """Conversations as lists of messages; the last message of each is the response."""

    name = "ultrafeedback"


class AnthropicHH(Columns):
    """Dialogues as text; the last turn is the response where chosen and rejected are whole.

    The prompt becomes messages, so that a chat template can write it; the plain template writes
    it back in the same form.
    """

    name = "anthropic_hh"

    def _text_prompt(self, row: Fields, column: str, lead: Turns) -> PromptText:
        text = text_of(row, column)
        is_question = bool(lead) and not text.lstrip().startswith("Human:")
        return text if is_question else dialogue_prompt(text, column)

    def _response(self, row: Fields, column: str) -> tuple[Turns, str]:
        if holds_messages(row.get(column)):
            return response_of(row, column)
        text = text_of(row, column)
        if self.names.prompt is None or is_dialogue(text):
            return dialogue_response(text, column)
        return (), text


def detect(
    columns: Sequence[str], row: Fields | None = None, names: Mapping[str, str] | None = None
) -> str:
    """Format of a data set by the names of its columns and, where they leave it open, a row.

    A prompt or a chosen text that is written as Human/Assistant turns makes it anthropic_hh;
    lists of messages make it ultrafeedback; everything else is columns. names is data.columns.
    """
    have, row, names = set(columns), row or {}, names or {}
    if not set(names) & {"prompt", "chosen", "rejected", "response"}:
        if {"response_0", "response_1"} <= have:
            return "pku_saferlhf"
        if {"info", "summaries"} <= have:
            return "tldr_comparisons"
    prompt, chosen, response = (
        row.get(names.get(key, key)) for key in ("prompt", "chosen", "response")
    )
    if isinstance(prompt, str) and is_dialogue_prompt(prompt):
        return "anthropic_hh"
    if any(isinstance(text, str) and is_dialogue(text) for text in (chosen, response)):
        return "anthropic_hh"
    if {"chosen", "rejected"} <= have and (isinstance(chosen, list) or "score_chosen" in have):
        return "ultrafeedback"
    return "columns"


def make_adapter(
    data_format: str, names: Mapping[str, str], columns: Sequence[str], row: Fields | None = None
) -> Adapter:
    """The adapter for config.DataFormat; `auto` is detected. names is data.columns."""
    for key in names:
        if key not in KEYS:
            raise UserError(
                f"data.columns: unknown key {key!r}{did_you_mean(key, KEYS)}; "
                f"known keys are {', '.join(KEYS)}"
            )
    if data_format == "auto":
        data_format = detect(columns, row, names)
    whole = data_format not in ("columns", "anthropic_hh", "ultrafeedback")
    named = name_columns(names, columns, row or {}, whole)
    if data_format == "columns":
        return Columns(named, columns)
    if data_format == "pku_saferlhf":
        return PKUSafeRLHF(named, columns, names.get("preference", "better_response_id"))
    if data_format == "anthropic_hh":
        return AnthropicHH(named, columns)
    if data_format == "tldr_comparisons":
        return TLDRComparisons(named, columns)
    if data_format == "ultrafeedback":
        return UltraFeedback(named, columns)
    raise UserError(f"data.format {data_format!r} is unknown")
