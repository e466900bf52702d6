"""Text -> token ids in which what a user wrote never becomes a control token.

A response may well contain the characters "<|im_end|>". Read as markup they would end the turn, so
a policy could be trained, or rewarded, on a response that stops where it does not. Content is
therefore encoded with `split_special_tokens`, and only what the chat template itself writes is
read as markup. Tokens that are added but not special (`<think>`) are text and stay whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import jinja2

from s2srm.data.schema import Message
from s2srm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Planes of private-use characters: no text that was meant for reading holds them.
_FIRST_MASK = 0xF0000


@dataclass(frozen=True)
class ControlTokens:
    """The special tokens of a tokenizer.

    ids maps their text to their id; pattern finds them as the tokenizer would, with the white
    space that a token with lstrip or rstrip swallows; never holds the ids that text must not give.
    """

    ids: Mapping[str, int]
    pattern: re.Pattern[str]
    never: frozenset[int]


@dataclass(frozen=True)
class Rendered:
    """A chat as text. The characters in masks stand for special-token strings in the content."""

    text: str
    masks: Mapping[str, str]


_cache: WeakKeyDictionary[Any, ControlTokens] = WeakKeyDictionary()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """The tokenizer's special tokens, looked up once."""
    if tokenizer not in _cache:
        added = tokenizer.added_tokens_decoder
        ids = {str(t): int(i) for t, i in zip(*_all_special(tokenizer), strict=True)}
        flags = {token.content: token for token in added.values() if token.special}
        ids |= {token.content: i for i, token in added.items() if token.special}
        parts = []
        for text in sorted(ids, key=len, reverse=True):
            left = r"\s*" if text in flags and flags[text].lstrip else ""
            right = r"\s*" if text in flags and flags[text].rstrip else ""
            parts.append(f"{left}{re.escape(text)}{right}")
        never = set(ids.values())
        # Unknown text is written as unk by tokenizers without bytes; that is no control token.
        if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            never.discard(tokenizer.unk_token_id)
        # Without any special token the pattern must match nothing, not the empty string.
        pattern = re.compile(f"({'|'.join(parts)})" if parts else r"(?!)()")
        _cache[tokenizer] = ControlTokens(ids, pattern, frozenset(never))
    return _cache[tokenizer]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text that a user wrote: no BOS, no EOS, and no control token whatever it contains.

    UserError if the tokenizer can write a part of it as a control token only.
    """
    ids = _encode(tokenizer, text, split_special_tokens=True)
    control = control_tokens(tokenizer)
    if not control.never.isdisjoint(ids):
        token = next(t for t, i in control.ids.items() if i in control.never and i in ids)
        raise UserError(
            f"the text contains {token!r}, which this tokenizer can only read as markup"
        )
    return ids


def encode_markup(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text that we wrote, in which special tokens are meant; nothing is added to it."""
    return _encode(tokenizer, text, split_special_tokens=False)


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Rendered:
    """The chat template's text for a conversation, up to where the next response begins.

    UserError with the template's words if it refuses the conversation.
    """
    control = control_tokens(tokenizer)
    contents = [m.content for m in messages]
    used = [t for t in control.ids if any(t in content for content in contents)]
    used.sort(key=len, reverse=True)
    first = _FIRST_MASK
    while any(chr(first + i) in content for i in range(len(used)) for content in contents):
        first += len(used)
    masks = {chr(first + i): token for i, token in enumerate(used)}
    chat = [{"role": m.role, "content": _replace(m.content, masks)} for m in messages]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses this prompt: {error}") from None
    assert isinstance(text, str)
    return Rendered(text, masks)


def encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> list[int]:
    """Ids of a rendered chat; BOS is there where the template writes it, and once."""
    if not rendered.masks:
        return encode_markup(tokenizer, rendered.text)
    # As the tokenizer does it: control tokens cut the text, each piece is encoded on its own.
    control = control_tokens(tokenizer)
    ids: list[int] = []
    for number, piece in enumerate(control.pattern.split(rendered.text)):
        if number % 2:
            ids.append(control.ids[piece if piece in control.ids else piece.strip()])
        elif piece:
            ids += encode_text(tokenizer, _restore(piece, rendered.masks))
    return ids


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, split_special_tokens: bool
) -> list[int]:
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=split_special_tokens,
        return_attention_mask=False,
        verbose=False,
    )
    return list(encoded["input_ids"])


def _all_special(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[int]]:
    return tokenizer.all_special_tokens, tokenizer.all_special_ids


def _replace(text: str, masks: Mapping[str, str]) -> str:
    for mask, token in masks.items():
        text = text.replace(token, mask)
    return text


def _restore(text: str, masks: Mapping[str, str]) -> str:
    for mask, token in masks.items():
        text = text.replace(mask, token)
    return text
