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


def strip_prompt(prompt: PromptText, response: str) -> str:
    """What follows the prompt in a response that begins with it; a space between is left out."""
    rest = _rest(prompt, response)
    if rest is None:
        raise BadRow("data.prompt_in_response is strip, and a response does not begin with its prompt")
    return rest.removeprefix(" ")


def check_repetition(
    cfg: DataConfig, rows: Sequence[tuple[PromptText, tuple[str, ...], str]]
) -> None:
    """UserError where at least half of the rows (prompt, responses, place) hold the prompt twice.

    A response counts if it begins with the whole prompt (of a conversation: its last turn) and
    goes on; a row counts if all of its responses do.
    """
    found = [
        where
        for prompt, responses, where in rows
        if all(_rest(prompt, response) is not None for response in responses)
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


def _rest(prompt: PromptText, response: str) -> str | None:
    """What follows the prompt, or None where the response does not begin with it and go on."""
    text, whole = as_turns(prompt)[-1].content.strip(), response.lstrip()
    if not text or not whole.startswith(text):
        return None
    rest = whole[len(text) :]
    in_a_word = text[-1].isalnum() and rest[:1].isalnum()
    return None if in_a_word or not rest.strip() else rest
