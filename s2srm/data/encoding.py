"""Text -> token ids in which what a user wrote never becomes a control token.

A response may well contain the characters "<|im_end|>". Read as markup they would end the turn, so
a policy could be trained, or rewarded, on a response that stops where it does not. Content is
therefore encoded with `split_special_tokens`, and only what the chat template itself writes is
read as markup. Tokens that are added but not special (`<think>`) are text and stay whole, except
those that frame the turns of a chat (`<|im_end|>` after a plain `add_tokens`).

Left out: content with control tokens' text under a tokenizer without a `tokenizers` backend.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from tokenizers import AddedToken

from s2srm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Planes of private-use characters: no text that was meant for reading holds them. The first stands
# for control tokens' text in the content, the second for the control tokens that are meant.
_FIRST_MASK = 0xF0000
_FIRST_NAME = 0x100000

# Texts after which a continuation is encoded; the first that shares no token with it serves.
_ANCHORS = ("\n", "a", ".", ":", "0", "a ")


@dataclass(frozen=True)
class ControlTokens:
    """The special tokens of a tokenizer, and those that frame the turns of its chats.

    ids maps their text to their id; pattern finds them as the tokenizer would, with the white
    space that a token with lstrip or rstrip swallows, and literal without it; never holds the ids
    that text must not give.
    """

    ids: Mapping[str, int]
    pattern: re.Pattern[str]
    literal: re.Pattern[str]
    never: frozenset[int]


_control: WeakKeyDictionary[Any, dict[frozenset[str], ControlTokens]] = WeakKeyDictionary()
_renamed: WeakKeyDictionary[Any, dict[frozenset[str], _Renamed]] = WeakKeyDictionary()


def control_tokens(
    tokenizer: PreTrainedTokenizerBase, markup: frozenset[str] = frozenset()
) -> ControlTokens:
    """The tokenizer's special tokens and those added tokens that are named, looked up once."""
    known = _control.setdefault(tokenizer, {})
    if markup not in known:
        known[markup] = _find_control_tokens(tokenizer, markup)
    return known[markup]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text that a user wrote: no BOS, no EOS, and no control token whatever it contains.

    UserError if the tokenizer can write a part of it as a control token only.
    """
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """encode_text of each text."""
    encoded = _encode(tokenizer, texts, split_special_tokens=True)
    control = control_tokens(tokenizer)
    for ids in encoded:
        _check_control(control, ids, [])
    return encoded


def encode_markup(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text that we wrote, in which special tokens are meant; nothing is added to it."""
    return _encode(tokenizer, [text], split_special_tokens=False)[0]


def encode_rendered(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    masks: Mapping[str, str],
    control: ControlTokens,
) -> list[list[int]]:
    """Ids of rendered chats, or of parts of them; BOS is there where the template writes it.

    The characters in masks stand for control tokens' text in the content. UserError if the
    tokenizer can write a part of the content as a control token only.
    """
    encoded = _encode(tokenizer, texts, split_special_tokens=False)
    for i, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
        num_found = sum(map(control.never.__contains__, ids))
        # More than were written: a normalizer made one of the content, of "<EOS>" in lower case.
        if any(mask in text for mask in masks) or num_found > len(control.literal.findall(text)):
            encoded[i] = _encode_renamed(tokenizer, text, masks, control)
    return encoded


def encode_continuing(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Ids of a text that goes on behind another one, so that nothing is put in front of it.

    encode(text) alone may begin with a space of its own (Llama 2's "▁"). UserError if the tokens
    of every text that was tried before it run into it.
    """
    for anchor in _ANCHORS:
        before = encode(anchor)
        ids = encode(anchor + text)
        if ids[: len(before)] == before:
            return ids[len(before) :]
    raise UserError(f"the tokenizer has no tokens of their own for {text!r:.60} inside a text")


def mask_control(
    control: ControlTokens, contents: list[str]
) -> tuple[list[str], Mapping[str, str]]:
    """The contents with one private-use character for each control token's text in them."""
    used = {t for content in contents for t in control.literal.findall(content)}
    if not used:
        return contents, {}
    # Restored in the other order: a token may be a part of another one.
    tokens = sorted(control.ids, key=len, reverse=True)
    tokens = [t for t in tokens if any(t in content for content in contents)]
    first = _FIRST_MASK
    while any(chr(first + i) in content for i in range(len(tokens)) for content in contents):
        first += len(tokens)
    masks = {chr(first + i): token for i, token in enumerate(tokens)}
    for mask, token in masks.items():
        contents = [content.replace(token, mask) for content in contents]
    return contents, masks


def _encode_renamed(
    tokenizer: PreTrainedTokenizerBase, text: str, masks: Mapping[str, str], control: ControlTokens
) -> list[int]:
    renamed = _renamed.setdefault(tokenizer, {})
    markup = frozenset(control.ids)
    if markup not in renamed:
        renamed[markup] = _Renamed(tokenizer, control)
    ids = renamed[markup].encode(text, masks)
    written = [control.ids[token] for token in control.literal.findall(text)]
    _check_control(control, ids, written)
    return ids


class _Renamed:
    """The tokenizer with private-use characters as names of its control tokens.

    Their real names are text to it, wherever they stand, and all else is encoded in its place: a
    text that was cut at control tokens and encoded by pieces would get a space per piece from
    tokenizers that put one before a text's first word only.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: ControlTokens) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                "the text contains the text of a control token, which a tokenizer without a "
                "tokenizer.json can only read as markup"
            )
        self._backend = copy.deepcopy(backend)
        self._backend.no_truncation()
        self._backend.no_padding()
        flags = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        self._names = {token: chr(_FIRST_NAME + i) for i, token in enumerate(control.ids)}
        # encode_special_tokens makes text of special tokens only; so all of them become special.
        self._backend.add_special_tokens([AddedToken(t, special=True) for t in control.ids])
        self._backend.add_tokens(
            [_like(flags.get(token), name) for token, name in self._names.items()]
        )
        self._backend.encode_special_tokens = True
        self._ids: dict[int, int] = {
            self._backend.token_to_id(name): control.ids[t] for t, name in self._names.items()
        }
        self._literal = control.literal

    def encode(self, text: str, masks: Mapping[str, str]) -> list[int]:
        if any(name in text for name in self._names.values()):
            raise UserError("the text contains control tokens' text and private-use characters")
        text, num_written = self._literal.subn(lambda match: self._names[match.group(0)], text)
        for mask, token in masks.items():
            text = text.replace(mask, token)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if sum(i in self._ids for i in ids) != num_written:
            raise UserError(
                "the tokenizer misses control tokens inside a text: add them with normalized=False"
            )
        return [self._ids.get(i, i) for i in ids]


def _like(token: Any, name: str) -> AddedToken:
    """A token of another name with the flags of an added token, if it is one."""
    if token is None:
        return AddedToken(name, normalized=False)
    return AddedToken(
        name,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=token.normalized,
    )


def _find_control_tokens(
    tokenizer: PreTrainedTokenizerBase, markup: frozenset[str]
) -> ControlTokens:
    added = tokenizer.added_tokens_decoder
    ids = {str(t): int(i) for t, i in zip(*_all_special(tokenizer), strict=True)}
    ids |= {t.content: i for i, t in added.items() if t.special or t.content in markup}
    flags = {token.content: token for token in added.values()}
    parts = []
    by_length = sorted(ids, key=len, reverse=True)
    for text in by_length:
        left = r"\s*" if text in flags and flags[text].lstrip else ""
        right = r"\s*" if text in flags and flags[text].rstrip else ""
        parts.append(f"{left}{re.escape(text)}{right}")
    never = set(ids.values())
    # Unknown text is written as unk by tokenizers without bytes; that is no control token.
    if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        never.discard(tokenizer.unk_token_id)
    # Without any control token the patterns must match nothing, not the empty string.
    pattern = re.compile(f"({'|'.join(parts)})" if parts else r"(?!)()")
    literal = re.compile("|".join(map(re.escape, by_length)) if parts else r"(?!)")
    return ControlTokens(ids, pattern, literal, frozenset(never))


def _check_control(control: ControlTokens, ids: list[int], written: list[int]) -> None:
    """UserError if there are more control tokens in ids than those that the template wrote."""
    if control.never.isdisjoint(ids):
        return
    for token, token_id in control.ids.items():
        if token_id in control.never and ids.count(token_id) > written.count(token_id):
            raise UserError(
                f"the text contains {token!r}, which this tokenizer can only read as markup"
            )


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, split_special_tokens: bool
) -> list[list[int]]:
    if not tokenizer.is_fast:
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            verbose=False,
        )
        return cast(list[list[int]], encoded["input_ids"])
    # What the call above does with it, without places of tokens in the text: they take a third.
    backend = cast(Any, tokenizer).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = split_special_tokens
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _all_special(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[int]]:
    return tokenizer.all_special_tokens, tokenizer.all_special_ids
