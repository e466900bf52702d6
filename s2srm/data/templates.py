"""How prompt, response and correction are written down as token ids.

    policy   prompt | response EOS
    RM       prompt | response | separator | correction EOS

Everything is joined by ids. plain: the prompt's text as it is, after BOS where the tokenizer adds
one by default; the separator is a piece of text. chat: the tokenizer's chat template (`chat.py`);
the separator closes the assistant's turn, holds one user turn that asks for a correction, and
opens the next assistant turn.

In plain text the space between prompt and response belongs to the response: a prompt that ends in
"TL;DR:" is followed by " A summary", because the token " A" is what a pretrained model expects
there. Tokenizers that put a space before every text (Llama 2's, stories260k's) get none from us.

Where a template writes earlier turns otherwise than the last one (Qwen3 leaves out their <think>
block; some put the system turn into the last user turn), the RM's sequence differs from a rendered
chat of four turns: prompt and response are read as they were sampled.

Left out: a system turn of its own for the request to correct.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from s2srm.config import TemplateConfig
from s2srm.data.chat import (
    chat_form,
    chat_template_text,
    encode_chat,
    encode_chat_separator,
)
from s2srm.data.encoding import encode_continuing, encode_markup, encode_text, encode_texts
from s2srm.data.schema import Message, PromptText
from s2srm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_NAME = "s2srm_template.json"
PLAIN_SEPARATOR = "\n\nCorrected response:"
CHAT_SEPARATOR = (
    "Improve your last response. If it is already as good as it can be, repeat it unchanged."
)

WITHOUT_SEPARATOR = ("kind", "eos_id", "prompt_ids", "response_prefix", "chat_sha256")
"""The fields of a `Template` that say how prompt and response are written."""
_SPEAKERS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}


@dataclass(frozen=True)
class Template:
    """Ids that stand around prompt, response and correction; saved with every trained model.

    separator_ids     between response and correction
    eos_id            ends a response: the chat template's end of turn, or the tokenizer's EOS
    prompt_ids        before a plain prompt: BOS, if the tokenizer adds one by default
    response_prefix   before a plain response: " ", or nothing if the tokenizer adds a space
    chat_sha256       of the chat template's text; None if plain
    """

    kind: Literal["plain", "chat"]
    separator: str
    separator_ids: tuple[int, ...]
    eos_id: int
    prompt_ids: tuple[int, ...]
    response_prefix: str
    chat_sha256: str | None

    @staticmethod
    def build(tokenizer: PreTrainedTokenizerBase, cfg: TemplateConfig) -> Template:
        """Template for a tokenizer. UserError if it lacks what the template needs."""
        has_chat = bool(tokenizer.chat_template)
        if cfg.kind == "chat" and not has_chat:
            raise UserError("template.kind is chat, but the tokenizer has no chat template")
        if cfg.chat_name is not None:
            _choose_chat_template(tokenizer, cfg)
        if cfg.kind == "chat" or (cfg.kind == "auto" and has_chat):
            return _build_chat(
                tokenizer, CHAT_SEPARATOR if cfg.separator is None else cfg.separator
            )
        return _build_plain(tokenizer, PLAIN_SEPARATOR if cfg.separator is None else cfg.separator)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, prompt: PromptText, responses: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of a prompt up to where a response begins, and of responses to it, without EOS.

        plain: messages become "\\n\\nHuman: ..\\n\\nAssistant:", with the text of a system message
        before them. One space is put before a response, unless it or the end of the prompt's text
        is white space already. chat: a prompt of text becomes one user turn, and what the template
        writes around a response is part of it.
        """
        if not isinstance(prompt, str) and prompt[-1].role == "assistant":
            raise UserError(
                "the prompt's last turn is the assistant's, which a response cannot follow: "
                "end it with a user turn"
            )
        if self.kind == "chat":
            messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
            return encode_chat(tokenizer, messages, responses)
        text = prompt if isinstance(prompt, str) else plain_dialogue(prompt)
        after_space = isinstance(prompt, str) and prompt[-1:].isspace()
        spaced = [not after_space and not response[:1].isspace() for response in responses]
        apart = [self.response_prefix + r for r, s in zip(responses, spaced, strict=True) if s]
        ids, *encoded = encode_texts(tokenizer, [text, *apart])
        found = iter(encoded)
        return [*self.prompt_ids, *ids], [
            next(found) if space else encode_continuing(partial(encode_text, tokenizer), response)
            for response, space in zip(responses, spaced, strict=True)
        ]

    def encode_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: PromptText) -> list[int]:
        """Ids of a prompt up to where the response begins, see encode."""
        return self.encode(tokenizer, prompt, ())[0]

    def encode_response(
        self, tokenizer: PreTrainedTokenizerBase, text: str, prompt: PromptText | None = None
    ) -> list[int]:
        """Ids of a response after those of its prompt, without EOS, see encode."""
        return self.encode(tokenizer, "x" if prompt is None else prompt, (text,))[1][0]

    def rm_input(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[int]:
        """prompt | response (an EOS at its end is left out) | separator: what the RM reads."""
        end = len(response_ids)
        if end and response_ids[-1] == self.eos_id:
            end -= 1
        return [*prompt_ids, *response_ids[:end], *self.separator_ids]

    def save(self, folder: str | Path) -> None:
        """Write s2srm_template.json into a model's folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (Path(folder) / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: str | Path) -> Template:
        """Read s2srm_template.json from a model's folder. UserError if it is missing or broken."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise UserError(f"{str(folder)!r} has no {FILE_NAME}: it was not trained by s2srm")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(values, dict) or sorted(values) != sorted(
            f.name for f in fields(Template)
        ):
            raise UserError(
                f"{path} must hold exactly {', '.join(f.name for f in fields(Template))}"
            )
        for name, fits in _VALID.items():
            if not fits(values[name]):
                raise UserError(f"{path}: {name} cannot be {values[name]!r:.80}")
        loaded: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return Template(**loaded)

    def check_same(self, other: Template, where: str, names: Sequence[str] | None = None) -> None:
        """UserError naming the first field in which the template of `where` differs from this.

        names: the fields that are compared, all by default.
        """
        for name in names or [f.name for f in fields(self)]:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise UserError(
                    f"{where} was trained with another template: {name} is {theirs!r} there and "
                    f"{mine!r} here; use the same template section and chat template"
                )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int for i in value)


_VALID: dict[str, Callable[[Any], bool]] = {
    "kind": lambda v: v in ("plain", "chat"),
    "separator": lambda v: isinstance(v, str),
    "separator_ids": lambda v: _is_ids(v) and len(v) > 0,
    "eos_id": lambda v: type(v) is int,
    "prompt_ids": _is_ids,
    "response_prefix": lambda v: v in ("", " "),
    "chat_sha256": lambda v: v is None or isinstance(v, str),
}


def plain_dialogue(messages: Sequence[Message]) -> str:
    """Messages as text in the form of Anthropic HH, ending in "\\n\\nAssistant:"."""
    turns = "".join(_SPEAKERS[m.role] + m.content for m in messages)
    return turns + "\n\nAssistant:"


def _build_plain(tokenizer: PreTrainedTokenizerBase, separator: str) -> Template:
    separator_ids = encode_markup(tokenizer, separator)
    _check_separator(tokenizer, separator, separator_ids)
    return Template(
        kind="plain",
        separator=separator,
        separator_ids=tuple(separator_ids),
        eos_id=_eos_id(tokenizer),
        prompt_ids=_default_start(tokenizer),
        response_prefix="" if _adds_space(tokenizer) else " ",
        chat_sha256=None,
    )


def _build_chat(tokenizer: PreTrainedTokenizerBase, separator: str) -> Template:
    if not separator.strip():
        raise UserError(
            "template.separator is empty: a chat needs a user turn between the responses"
        )
    form = chat_form(tokenizer)
    separator_ids = encode_chat_separator(tokenizer, separator)
    _check_separator(tokenizer, separator, separator_ids)
    return Template(
        kind="chat",
        separator=separator,
        separator_ids=tuple(separator_ids),
        eos_id=_eos_id(tokenizer) if form.eos_id is None else form.eos_id,
        prompt_ids=(),
        response_prefix="",
        chat_sha256=hashlib.sha256(chat_template_text(tokenizer).encode()).hexdigest(),
    )


def _choose_chat_template(tokenizer: PreTrainedTokenizerBase, cfg: TemplateConfig) -> None:
    """Make the named template the tokenizer's only one, so that it is saved with the model."""
    if cfg.kind == "plain":
        raise UserError("template.chat_name names a chat template, but template.kind is plain")
    templates = tokenizer.chat_template
    names = templates if isinstance(templates, dict) else {}
    if cfg.chat_name not in names:
        has = f"only {', '.join(sorted(names))}" if names else "no named chat templates"
        raise UserError(f"template.chat_name is {cfg.chat_name!r}: the tokenizer has {has}")
    tokenizer.chat_template = names[cfg.chat_name]


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    eos_id = tokenizer.eos_token_id
    if not isinstance(eos_id, int):
        raise UserError("the tokenizer has no end-of-sequence token (eos_token)")
    return eos_id


def _check_separator(
    tokenizer: PreTrainedTokenizerBase, separator: str, separator_ids: Sequence[int]
) -> None:
    if not separator_ids:
        raise UserError(f"template.separator {separator!r} gives no tokens")
    unk = tokenizer.unk_token
    if unk is not None and str(unk) not in separator and tokenizer.unk_token_id in separator_ids:
        raise UserError(
            f"template.separator {separator!r} has a part that the tokenizer has no token for; "
            "set template.separator to text that it can write"
        )


def _default_start(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text by default: BOS or nothing; never an EOS."""
    bare = encode_markup(tokenizer, "a")
    full: list[int] = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    raise UserError("the tokenizer changes a text's tokens when it adds special tokens to it")


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if two texts encoded apart and decoded together have a space between them."""
    ids = encode_text(tokenizer, "a")
    return len(str(tokenizer.decode([*ids, *ids])).split()) == 2
