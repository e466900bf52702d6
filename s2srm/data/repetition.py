"""Responses that begin with their own prompt: part of the data's form, or what was answered?

Some data sets write chosen and rejected as prompt + response in one text. Read as they are, the
prompt would be in every sequence twice. One row cannot tell whether the prompt is repeated or
included; most rows of a data set can. Left out: prompts that are repeated anywhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from s2srm.config import DataConfig
from s2srm.data.fields import BadRow
from s2srm.data.messages import as_turns
from s2srm.data.schema import PromptText
from s2srm.errors import UserError

logger = logging.getLogger(__name__)


# How far into a response the prompt may begin: behind "### Human: " or a template's preamble.
_MARK_CHARACTERS = 200
# A shorter prompt can stand within a response by chance.
_SHORTEST_WITHIN = 10


def strip_prompt(prompt: PromptText, response: str) -> str:
    """What follows the prompt in a response that begins with it; a space between is left out."""
    found = _split(prompt, response)
    if found is None or found[0]:
        raise BadRow(
            "a response does not begin with its prompt, which data.prompt_in_response strip needs"
        )
    return found[1].removeprefix(" ")


def check_repetition(
    cfg: DataConfig, rows: Sequence[tuple[PromptText, tuple[str, ...], str]]
) -> None:
    """UserError where at least half of the rows (prompt, responses, place) hold the prompt twice.

    A response counts if it begins with the whole prompt (of a conversation: its last turn), or
    with a mark of the speaker and then the prompt, and goes on; a row if all its responses do.
    """
    found = [
        where
        for prompt, responses, where in rows
        if all(_split(prompt, response) is not None for response in responses)
    ]
    if not found:
        return
    what = f"in {len(found)} of {len(rows)} rows (first {found[0]}) every response begins with the "
    if 2 * len(found) >= len(rows):
        raise UserError(
            f"data path {cfg.path!r}: {what}whole prompt, which would be trained on twice; "
            "data.prompt_in_response: strip takes it out of the responses, keep leaves it there"
        )
    logger.info("%s: %sprompt; they are kept (data.prompt_in_response)", cfg.path, what)


def _split(prompt: PromptText, response: str) -> tuple[str, str] | None:
    """What stands before and after the prompt at the start of a response, if it is there."""
    text, whole = as_turns(prompt)[-1].content.strip(), response.strip()
    if not text:
        return None
    longest = _MARK_CHARACTERS if len(text) >= _SHORTEST_WITHIN else 0
    at = whole.find(text, 0, longest + len(text))
    if at < 0:
        return None
    before, rest = whole[:at], response.lstrip()[at + len(text) :]
    in_a_word = (text[-1].isalnum() and rest[:1].isalnum()) or (
        text[0].isalnum() and before[-1:].isalnum()
    )
    return None if in_a_word or not rest.strip() else (before, rest)
