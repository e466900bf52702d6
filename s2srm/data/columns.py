"""Which column of a data set is which: its own names, data.columns, and names in common use.

The first name that is there counts. A column under another name is read as the prompt only where
nothing else can be meant. What may belong to a prompt and is not read is said in the log; a name
mapped to "" is not looked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2srm.data.dialogues import is_dialogue
from s2srm.data.fields import BadRow, Fields, optional_text
from s2srm.data.messages import Turns, holds_messages, turns_of
from s2srm.data.schema import Message, Need
from s2srm.errors import UserError, did_you_mean, nearest

CONTEXT_KEYS = ("system", "history", "input")
KEYS = ("prompt", "chosen", "rejected", "response", "preference", *CONTEXT_KEYS)

_PROMPT_NAMES = ("question", "instruction", "query", "input", "problem")
_CONVERSATION_NAMES = ("messages", "conversations", "conversation")
_SYSTEM_NAMES = ("system", "system_prompt", "system_message")
_CONTEXT_NAMES = {"system": _SYSTEM_NAMES, "history": ("history",), "input": ("input",)}
_MAY_BELONG_TO_THE_PROMPT = {
    *_PROMPT_NAMES,
    *_CONVERSATION_NAMES,
    *_SYSTEM_NAMES,
    *("prompt", "history", "context", "passage", "document", "documents", "persona", "knowledge"),
    *("tools", "functions", "image", "images", "audio", "video", "videos"),
}
# What an error proposes for a part that is missing; nothing is read under these names unasked.
_LIKELY = {
    "prompt": ("text", "user", "source", "post", "article", "document", "context"),
    "chosen": ("winner", "preferred", "better", "accepted", "good", "positive"),
    "rejected": ("loser", "dispreferred", "worse", "refused", "bad", "negative"),
    "response": ("response", "output", "completion", "answer", "target", "summary"),
}


@dataclass(frozen=True)
class ColumnNames:
    """Column of each part; None where there is none.

    conversation holds prompt and response; whole says that chosen (or response) does so too.
    """

    prompt: str | None
    whole: bool
    chosen: str
    rejected: str
    response: str
    conversation: str | None
    system: tuple[str, ...]
    history: str
    input: str

    def answer(self, response_column: str, columns: Collection[str]) -> str:
        """The column of a demonstration's response: the one asked for, else the conversation."""
        asked = self.chosen if response_column == "chosen" else self.response
        return self.conversation if self.conversation and asked not in columns else asked


def name_columns(
    names: Mapping[str, str], columns: Sequence[str], sample: Fields, whole: bool = False
) -> ColumnNames:
    """names is data.columns; sample holds a value of each column that has one.

    whole says that the responses come with their prompt, whatever the sample holds.
    """
    chosen, rejected, response = (names.get(c, c) for c in ("chosen", "rejected", "response"))
    conversation = next((c for c in _CONVERSATION_NAMES if c in columns), None)
    prompt = names.get("prompt") or ("prompt" if "prompt" in columns else None)
    whole = whole or any(carries_prompt(sample.get(c)) for c in (chosen, response))
    answers = {chosen, rejected, response}
    # A column is one thing only: what data.columns calls the prompt is no history as well.
    taken = {names[key] for key in names if key not in CONTEXT_KEYS}
    if prompt is None and not whole and (conversation is None or not answers.isdisjoint(columns)):
        prompt = _other_prompt(columns, answers, conversation)
    uses_input = prompt == "instruction" or "input" in names
    return ColumnNames(
        prompt=prompt,
        whole=whole,
        chosen=chosen,
        rejected=rejected,
        response=response,
        conversation=None if conversation == prompt else conversation,
        system=_context("system", names, taken),
        history="".join(_context("history", names, taken)),
        input="".join(_context("input", names, taken)) if uses_input else "",
    )


def _context(key: str, names: Mapping[str, str], taken: Collection[str]) -> tuple[str, ...]:
    """Names of a column that belongs to the prompt: the one asked for, or those in common use."""
    if key in names:
        return (names[key],)
    return tuple(name for name in _CONTEXT_NAMES[key] if name not in taken)


def carries_prompt(value: Any) -> bool:
    """Whether a response comes with the turns before it."""
    if isinstance(value, str):
        return is_dialogue(value)
    if not holds_messages(value):
        return False
    parts = value if isinstance(value, list) else value.get("role", value.get("from"))
    return isinstance(parts, list) and len(parts) > 1


def system_of(row: Fields, names: Sequence[str]) -> str | None:
    """The text of the system column, under any of its names; blank and null are none."""
    found = {text for name in names if name and (text := optional_text(row, name)) is not None}
    if len(found) > 1:
        raise BadRow(
            f"columns {', '.join(repr(n) for n in names if row.get(n))} hold different texts; "
            "data.columns.system says which is the system turn"
        )
    return found.pop() if found else None


def history_of(row: Fields, name: str) -> Turns:
    """Earlier turns: a list of pairs of user's and assistant's text, or of messages."""
    value = row.get(name) if name else None
    if not value:
        return ()
    if not isinstance(value, list):
        raise BadRow(f"column {name!r} holds no list of earlier turns: {value!r:.40}")
    if not all(isinstance(pair, list) for pair in value):
        return turns_of(row, name)
    turns: list[Message] = []
    for number, pair in enumerate(value):
        if len(pair) != 2 or not all(isinstance(t, str) and t.strip() for t in pair):
            raise BadRow(f"{name}[{number}] is not a pair of texts of user and assistant")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return tuple(turns)


def unread_prompt_columns(
    unread: Sequence[str], named: ColumnNames, names: Mapping[str, str]
) -> list[str]:
    """Those that may belong to the prompt, but for what data.columns says is not to be read.

    Where chosen holds the whole conversation, another copy of it or of the question adds nothing.
    """
    known = {*_PROMPT_NAMES, *_CONVERSATION_NAMES} if named.whole else set[str]()
    known |= {c for key in CONTEXT_KEYS if names.get(key) == "" for c in _CONTEXT_NAMES[key]}
    suspects = _MAY_BELONG_TO_THE_PROMPT - known
    return [name for name in unread if name.lower() in suspects]


def missing_column(
    source: str, part: str, name: str, format_name: str, need: Need, sample: Fields
) -> UserError:
    """The error for a column that is not there, with what is likely meant. part: its key."""
    found = ", ".join(map(repr, sample)) or "none"
    return UserError(
        f"{source}: no column {name!r}, which format {format_name} needs; found {found}"
        f"{_remedy(part, name, need, sample)}"
    )


def _other_prompt(columns: Sequence[str], answers: set[str], conversation: str | None) -> str:
    """The one column that is a prompt under another name. UserError where several could be it."""
    found = [c for c in _PROMPT_NAMES if c in columns and c not in answers]
    if set(found) == {"instruction", "input"}:
        found = ["instruction"]
    found += [conversation] if conversation else []
    if len(found) > 1:
        raise UserError(
            f"data.columns: columns {' and '.join(map(repr, found))} could each be the prompt; say "
            f"which, as in --data.columns.prompt {found[0]}"
        )
    return found[0] if found else "prompt"


def _remedy(part: str, name: str, need: Need, sample: Fields) -> str:
    if near := nearest(name, sample):
        key = f" (--data.columns.{part} {near})" if part in KEYS else ""
        return f"{did_you_mean(name, sample)}{key}"
    rows = next((column for column, value in sample.items() if _holds_rows(value)), None)
    if rows is not None:
        return f"; column {rows!r} holds a list of objects: if those are the rows, write them out"
    if part not in KEYS:
        return ""
    if need == "demonstration" and part in ("chosen", "response"):
        likely = next((c for c in _LIKELY["response"] if c in sample), "COLUMN")
        return f"; --response_column response --data.columns.response {likely} reads another"
    likely = next((c for c in _LIKELY.get(part, ()) if c in sample), None)
    texts = [c for c, value in sample.items() if isinstance(value, str) and c not in KEYS]
    if part in ("chosen", "rejected") and likely is None:
        return (
            "; a preference needs two responses, chosen and rejected (or what data.columns calls "
            "so); rows with one answer are for sft"
        )
    if part == "prompt" and not texts:
        return (
            "; without it, chosen and rejected must be messages or dialogues of 'Human:' and "
            "'Assistant:' that begin with the prompt"
        )
    likely = likely or (texts[0] if len(texts) == 1 else "COLUMN")
    return f"; --data.columns.{part} {likely} reads it from there"


def _holds_rows(value: Any) -> bool:
    if not (isinstance(value, list) and value and isinstance(value[0], Mapping)):
        return False
    return not any(key in value[0] for key in ("role", "from", "speaker"))
