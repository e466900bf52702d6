"""Dialogues written as text in the form of Anthropic HH -> messages.

    \\n\\nHuman: Hi\\n\\nAssistant: Hello\\n\\nHuman: More\\n\\nAssistant: ...

Turns are stripped, and two turns of one speaker in a row (a few real rows) are joined by an empty
line, because some chat templates demand that speakers alternate.
"""

from __future__ import annotations

import re

from s2srm.data.fields import BadRow
from s2srm.data.messages import Turns
from s2srm.data.schema import Message

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}
_LAST = "\n\nAssistant:"


def is_dialogue(text: str) -> bool:
    """True for text that starts with Human's turn and has one of Assistant."""
    return text.lstrip().startswith("Human:") and _LAST in text


def is_dialogue_prompt(text: str) -> bool:
    """True for a dialogue, also one that holds nothing but Human's turn."""
    return is_dialogue(text) or text.startswith("\n\nHuman:")


def dialogue_prompt(text: str, column: str) -> Turns:
    """A dialogue that ends in "Assistant:" or in Human's turn -> its turns."""
    _, *pieces = _TURN.split(text.strip())
    turns = [
        (_ROLE[speaker], content.strip())
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if turns and turns[-1] == ("assistant", ""):
        turns.pop()
    elif turns and turns[-1][0] == "assistant":
        turns.clear()
    if not turns or not text.lstrip().startswith("Human:"):
        raise BadRow(
            f"column {column!r}: the prompt is not a dialogue that starts with 'Human:' and ends "
            "in 'Assistant:'"
        )
    messages: list[Message] = []
    for role, content in turns:
        if messages and messages[-1].role == role:
            joined = "\n\n".join(t for t in (messages[-1].content, content) if t)
            messages[-1] = Message(role, joined)
        else:
            messages.append(Message(role, content))
    if not any(m.content for m in messages):
        raise BadRow(f"column {column!r}: the prompt holds turns without text")
    return tuple(messages)


def dialogue_response(text: str, column: str) -> tuple[Turns, str]:
    """A whole dialogue -> the turns before its last one, and that one, which is Assistant's."""
    cut = text.rfind(_LAST)
    if cut < 0 or not is_dialogue(text):
        raise BadRow(f"column {column!r} is not a dialogue of 'Human:' and 'Assistant:' turns")
    response = text[cut + len(_LAST) :].strip()
    if not response or "\n\nHuman:" in response:
        raise BadRow(f"column {column!r} does not end in an Assistant turn with text")
    return dialogue_prompt(text[: cut + len(_LAST)], column), response
