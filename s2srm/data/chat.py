"""Where a tokenizer's chat template begins and ends an answer, and the ids of both parts.

The rule: prompt | response | end of turn are the tokens of the chat template applied to the whole
conversation, for that is what other trainers teach, and what a chat model has learnt to write. So
every response is rendered in its conversation, and its ids are those that come after the prompt's.

Where the prompt ends, the first of these whose tokens begin those of the whole:

    1. with the generation prompt, as the model is sampled, but for spaces at its end: they belong
       to the response, as in " word". So does what the template puts between the two: Llama 2's
       space, Qwen3's empty <think> block.
    2. where the answer's text begins, again but for spaces: templates that ignore
       add_generation_prompt or write another one than stands before an answer (DeepSeek-R1:
       "<think>"). This one is logged if the template does know generation prompts.
    3. as 2, but for any white space: tokenizers that read a line break as a space.

The response ends with the token that the template writes after an answer, special or only added.
A prompt's tokens do not depend on its answer, but for one that repeats what only the generation
prompt has: where an answer's first token and the prompt's last one would be one (a response that
begins with a line break after "assistant\\n"), the prompt stays as it is sampled from and the rest
follows in tokens of its own; the text is the template's.

Left out: tools, documents and images; dates that a template takes from the clock are not frozen.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from s2srm.data.encoding import (
    ControlTokens,
    control_tokens,
    encode_continuing,
    encode_rendered,
    mask_control,
)
from s2srm.data.schema import Message
from s2srm.errors import UserError

logger = logging.getLogger(__name__)

# Stand for the last answer and for an earlier one; a chat template passes them on.
_ANSWER = Message("assistant", "\U000ff001")
_EARLIER = Message("assistant", "\U000ff002")
_USER = Message("user", "\U000ff003")

# What answers begin with.
_TYPICAL = ("I", "The", "Yes", "a")

Cut = Literal["generation prompt", "spaces", "white space"]


@dataclass(frozen=True)
class ChatForm:
    """What a chat template writes around an answer.

    control    special tokens, and added ones that frame turns
    control_ids  their ids
    cut        where a prompt ends, see above
    spaces     no generation prompt, and at most spaces between the prompt and an answer
    lead, end  between the last answer and its end-of-turn token, and that token; "" if none
    after      all that follows the last answer
    eos_id     ends a response; None if the template writes no end of turn
    """

    control: ControlTokens
    control_ids: frozenset[int]
    cut: Cut
    spaces: bool
    lead: str
    end: str
    after: str
    eos_id: int | None


_forms: WeakKeyDictionary[Any, dict[str, ChatForm]] = WeakKeyDictionary()


def chat_template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template in use. UserError if there are several and none of them is the default."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"the tokenizer has the chat templates {', '.join(sorted(templates))} and no default: "
            "name one in template.chat_name"
        )
    return tokenizer.get_chat_template()


def chat_form(tokenizer: PreTrainedTokenizerBase) -> ChatForm:
    """The form of the tokenizer's chat template, derived once.

    UserError if the template hides the answer or cannot be rendered.
    """
    template = chat_template_text(tokenizer)
    known = _forms.setdefault(tokenizer, {})
    if template not in known:
        known[template] = _derive(tokenizer)
        _warn_of_dates(tokenizer, template)
    return known[template]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answers: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Ids of a conversation up to where an answer begins, and of each answer behind it.

    An answer has with it what the template writes around it, but not the end of turn. UserError if
    the template refuses the conversation or an answer changes the prompt's text.
    """
    form = chat_form(tokenizer)
    masked, masks = _masked(
        form.control, [*messages, *(Message("assistant", answer) for answer in answers)]
    )
    turns = masked[: len(messages)]
    # Without text there is no answer, whatever the template writes around it.
    spoken = [answer for answer in masked[len(messages) :] if answer.content.strip()]
    wholes = _render(tokenizer, *([*turns, answer] for answer in spoken))
    prompt = _prompt_text(tokenizer, form, turns, spoken, wholes)
    wholes = [_to_end_of_turn(form, whole) for whole in wholes]
    if not all(whole.startswith(prompt) for whole in wholes):
        raise UserError("the chat template writes the prompt otherwise before this response")

    def encode(texts: list[str]) -> list[list[int]]:
        return encode_rendered(tokenizer, texts, masks, form.control)

    # Control tokens cut a text: what stands before the last of them does not change the rest.
    marks = list(form.control.literal.finditer(prompt)) if tokenizer.is_fast else []
    start = marks[-1].start() if marks else 0
    prompt_ids, *encoded = encode([prompt, *(whole[start:] for whole in wholes)])
    head = prompt_ids
    if start and wholes:
        places = [i for i, token in enumerate(prompt_ids) if token in form.control_ids]
        # Unless the tokenizer missed one, or has unknown text, they are those in the text.
        matched = len(places) == len(marks)
        head = prompt_ids[places[-1] :] if matched else encode([prompt[start:]])[0]
    answer_ids = []
    for whole, ids in zip(wholes, encoded, strict=True):
        if ids[: len(head)] == head:
            ids = ids[len(head) :]
        else:
            ids = encode_continuing(lambda text: encode([text])[0], whole[len(prompt) :])
        if form.end:
            assert ids[-1] == form.eos_id
            ids.pop()
        answer_ids.append(ids)
    found = iter(answer_ids)
    return prompt_ids, [next(found) if answer.strip() else [] for answer in answers]


def encode_chat_separator(tokenizer: PreTrainedTokenizerBase, separator: str) -> list[int]:
    """Ids from an answer's end of turn, over a user turn with the separator, to the next answer."""
    form = chat_form(tokenizer)
    turns = (_USER, _EARLIER, Message("user", separator))
    masked, masks = _masked(form.control, turns)
    text = _around(_prompt_text(tokenizer, form, masked), _EARLIER.content)[1]
    if form.end and text.startswith(form.lead + form.end):
        text = text[len(form.lead) :]  # it belongs to the response, as at the end of the chat

    def encode(text: str) -> list[int]:
        return encode_rendered(tokenizer, [text], masks, form.control)[0]

    if form.control.literal.match(text):
        return encode(text)
    return encode_continuing(encode, text)


def _derive(tokenizer: PreTrainedTokenizerBase) -> ChatForm:
    whole, bare = _render(tokenizer, (_USER, _ANSWER), (_USER,))
    (generation,) = _render(tokenizer, (_USER,), generation=True)
    (turns,) = _render(tokenizer, (_USER, _EARLIER, _USER, _ANSWER))
    before, after = _around(whole, _ANSWER.content)
    first, rest = _around(turns, _EARLIER.content)
    opening, between = first.partition(_USER.content)[0], rest.partition(_USER.content)[0]
    if generation != bare and first.startswith(generation):
        first = generation  # the rest is the answer's: an empty <think> block, which is text
    written = (first, between, after)
    control = control_tokens(tokenizer, _markup(tokenizer, written))
    lead, end = _end_of_turn(tokenizer, control, after)
    eos = end
    if not end:
        # Templates may leave it out at the end of a chat; what starts a turn ends none.
        _, eos = _end_of_turn(tokenizer, control, between)
        eos = "" if eos in opening else eos
    form = ChatForm(
        control=control,
        control_ids=frozenset(control.ids.values()),
        cut="spaces",
        spaces=generation == bare and before.rstrip(" ") == bare.rstrip(" "),
        lead=lead,
        end=end,
        after=after,
        eos_id=control.ids[eos] if eos else None,
    )
    return replace(form, cut=_find_cut(tokenizer, form, before, bare, generation))


def _find_cut(
    tokenizer: PreTrainedTokenizerBase, form: ChatForm, before: str, bare: str, generation: str
) -> Cut:
    """The first of the module's three places whose tokens begin those of the whole."""

    def encode(text: str) -> list[int]:
        text = text.replace(_USER.content, "Hi")
        return encode_rendered(tokenizer, [text], {}, form.control)[0]

    places: dict[Cut, str] = {"spaces": before.rstrip(" "), "white space": before.rstrip()}
    if before.startswith(generation) and (
        generation != bare or not before[len(generation) :].strip()
    ):
        first: dict[Cut, str] = {"generation prompt": generation.rstrip(" ")}
        places = first | places
    wholes = [encode(_to_end_of_turn(form, before + a + form.after)) for a in _TYPICAL]
    if form.end and wholes[0][-1] != form.eos_id:
        raise UserError(
            f"the chat template ends turns with {form.end!r}, which the tokenizer does not read as "
            "one token behind a text: add it with normalized=False"
        )
    fits: list[Cut] = []
    for cut, text in places.items():
        ids = encode(text)
        if all(whole[: len(ids)] == ids for whole in wholes):
            fits.append(cut)
    cut = fits[0] if fits else next(iter(places))
    if generation not in (bare, places[cut]) and generation.rstrip() != places[cut].rstrip():
        logger.warning(
            "the chat template begins an answer with %r in a conversation and with %r to generate "
            "one; prompts end as in a conversation",
            places[cut].rpartition(_USER.content)[2],
            generation.rpartition(_USER.content)[2],
        )
    return cut


def _markup(tokenizer: PreTrainedTokenizerBase, written: Sequence[str]) -> frozenset[str]:
    """Added tokens that are not special but frame turns; words and white space are text."""
    return frozenset(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if not token.special
        and not all(c.isalnum() or c.isspace() for c in token.content)
        and any(token.content in text for text in written)
    )


def _end_of_turn(
    tokenizer: PreTrainedTokenizerBase, control: ControlTokens, after: str
) -> tuple[str, str]:
    """(text before it, token) of the control token that ends the turn of an answer, or "", "".

    Only white space may stand before it, and other control tokens if it is the tokenizer's EOS
    (Command A: "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>").
    """
    start = len(after) - len(after.lstrip())
    run: list[tuple[str, str]] = []
    while (found := control.literal.match(after, start)) is not None:
        run.append((after[:start], found.group(0)))
        start = found.end()
    if not run:
        return "", ""
    for lead, token in run:
        if control.ids[token] == tokenizer.eos_token_id:
            return lead, token
    # A template without an end of turn may begin the next turn with BOS.
    return ("", "") if control.ids[run[0][1]] == tokenizer.bos_token_id else run[0]


def _to_end_of_turn(form: ChatForm, whole: str) -> str:
    """A rendered conversation without what follows the last answer's end of turn."""
    if form.end:
        # Content holds no control token, so the last ones are the template's.
        parts = whole.rsplit(form.end, form.after.count(form.end))
        if len(parts) > 1:
            return parts[0] + form.end
    elif whole.endswith(form.after):
        return whole[: len(whole) - len(form.after)]
    raise UserError("the chat template does not end this response as it ends others")


def _prompt_text(
    tokenizer: PreTrainedTokenizerBase,
    form: ChatForm,
    messages: Sequence[Message],
    answers: Sequence[Message] = (),
    wholes: Sequence[str] = (),
) -> str:
    """The text up to where an answer begins; wholes are the conversation with each answer.

    They tell it without another rendering, if they begin with the generation prompt or if all that
    stands before an answer is the prompt.
    """
    if form.spaces and wholes:
        ends = [answer.content + form.after for answer in answers]
        begins = {w.removesuffix(e).rstrip(" ") for w, e in zip(wholes, ends, strict=True)}
        bare = all(answer.content == answer.content.strip() for answer in answers)
        if bare and len(begins) == 1 and all(map(str.endswith, wholes, ends)):
            return begins.pop()
    generation = None
    if form.cut == "generation prompt":
        (generation,) = _render(tokenizer, messages, generation=True)
        if wholes and all(whole.startswith(generation) for whole in wholes):
            return generation.rstrip(" ")
    (whole,) = _render(tokenizer, [*messages, _ANSWER])
    before, _ = _around(whole, _ANSWER.content)
    if generation is not None:
        if before.startswith(generation):
            return generation.rstrip(" ")
        _warn_once(
            "the chat template writes some prompts otherwise when an answer follows (a system "
            "turn may be missing); its text for the whole conversation is what counts"
        )
    return before.rstrip(None if form.cut == "white space" else " ")


def _render(
    tokenizer: PreTrainedTokenizerBase, *chats: Sequence[Message], generation: bool = False
) -> list[str]:
    """The chat template's texts. UserError with the template's words if it refuses or fails."""
    turns = [[{"role": m.role, "content": m.content} for m in chat] for chat in chats]
    apply = tokenizer.apply_chat_template
    try:
        if getattr(apply, "__func__", None) is PreTrainedTokenizerBase.apply_chat_template:
            # What it does after checks that take as long.
            rendered, _ = render_jinja_template(
                conversations=cast(Any, turns),
                chat_template=tokenizer.get_chat_template(),
                add_generation_prompt=generation,
                **cast(dict[str, Any], tokenizer.special_tokens_map),
            )
            texts = cast(list[str], rendered)
        else:  # a tokenizer with its own
            texts = [
                cast(str, apply(chat, tokenize=False, add_generation_prompt=generation))
                for chat in turns
            ]
    except Exception as error:  # a template is a program, and may fail in any way
        words = " ".join(str(error).split())
        if type(error) is jinja2.TemplateError:  # what its raise_exception raises
            problem = f"refuses this prompt: {words}"
        else:
            problem = f"fails on this prompt: {type(error).__name__}: {words}"
        raise UserError(f"the tokenizer's chat template {problem}") from None
    return texts


def _masked(
    control: ControlTokens, messages: Sequence[Message]
) -> tuple[list[Message], Mapping[str, str]]:
    contents, masks = mask_control(control, [m.content for m in messages])
    if not masks:
        return list(messages), masks
    pairs = zip(messages, contents, strict=True)
    return [Message(m.role, content) for m, content in pairs], masks


def _around(text: str, mark: str) -> tuple[str, str]:
    parts = text.split(mark)
    if len(parts) != 2:
        raise UserError("the chat template does not show the assistant's turn exactly once")
    return parts[0], parts[1]


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _warn_of_dates(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    if "strftime_now" in template and str(date.today().year) in _render(tokenizer, (_USER,))[0]:
        logger.warning(
            "the chat template writes today's date into prompts: models trained on another day "
            "read another date; write a fixed one into the template to repeat a run"
        )
