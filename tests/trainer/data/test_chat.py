"""Tokens of prompt and response are those of the chat template, for many templates."""

from __future__ import annotations

import logging
from typing import Any

import chat_templates as chats
import pytest
import small_tokenizers as small
from chat_templates import FAMILIES, Family
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from s2srm.config import TemplateConfig
from s2srm.data.schema import Message
from s2srm.data.templates import CHAT_SEPARATOR, Template
from s2srm.errors import UserError

ASK = Message("user", "How are you today, my 2 friends?")
SYSTEM = Message("system", "Be kind. Answer in a few words.")
HISTORY = (ASK, Message("assistant", "I am well, thanks."), Message("user", "And the weather?"))
CONVERSATIONS = {
    "one turn": (ASK,),
    "system": (SYSTEM, ASK),
    "three turns": HISTORY,
    "system and three turns": (SYSTEM, *HISTORY),
    "odd": (Message("user", "  Tell me\n\n a naïve joke 日本 🙂 \n"),),
}
ANSWERS = [
    "The answer is 42.",
    "I",
    "(1) Yes <b>ok</b>",
    "- a\n- b",
    " leading space",
    "trailing  ",
    "ünï 日本 🙂\n\n  x",
]
# Their templates write nothing after the last answer; responses end all the same.
OPEN_ENDED = {"qwen-1.5", "falcon-instruct", "glm-4"}
# Earlier answers are written otherwise than the last one, or the system turn moves.
OTHER_HISTORY = {"qwen-3", "qwen-3-thinking"}
MOVES_SYSTEM = {"mistral-v3"}


def as_chat(*messages: Message) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def own(tokenizer: PreTrainedTokenizerBase, *messages: Message, **kwargs: Any) -> list[int]:
    """The ids of the tokenizer's own chat template."""
    return tokenizer.apply_chat_template(as_chat(*messages), return_dict=False, **kwargs)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Family]:
    return request.param, FAMILIES[request.param]


def test_tokens_are_those_of_the_whole_conversation(family: tuple[str, Family]) -> None:
    """And the RM's are those of the chat in which the user asks for a correction."""
    name, made = family
    tokenizer = made.tokenizer()
    template = Template.build(tokenizer, TemplateConfig())
    assert tokenizer.convert_ids_to_tokens(template.eos_id) == made.end
    num_checked = 0
    for which, prompt in CONVERSATIONS.items():
        for text in ANSWERS:
            answer = Message("assistant", text)
            try:
                whole = own(tokenizer, *prompt, answer)
            except Exception as error:
                assert "system" in which and "not supported" in str(error)
                with pytest.raises(UserError, match="System role not supported"):
                    template.encode_prompt(tokenizer, prompt)
                continue
            prompt_ids = template.encode_prompt(tokenizer, prompt)
            response = template.encode_response(tokenizer, text, prompt)
            ours = [*prompt_ids, *response, template.eos_id]
            if name in OPEN_ENDED:
                assert ours[:-1] == whole, (which, text)
            else:
                assert ours == whole[: len(ours)], (which, text)
                rest = tokenizer.decode(whole[len(ours) :]).replace(made.eos, "")
                assert not rest.strip().removeprefix("<|END_RESPONSE|>"), (which, text)
            num_checked += 1
            if name in OTHER_HISTORY or (name in MOVES_SYSTEM and "system" in which):
                continue
            correction = template.encode_response(tokenizer, "The better one", prompt)
            read = template.rm_input(prompt_ids, [*response, template.eos_id])
            ours = [*read, *correction, template.eos_id]
            turns = (*prompt, answer, Message("user", CHAT_SEPARATOR))
            whole = own(tokenizer, *turns, Message("assistant", "The better one"))
            assert ours[: len(whole)] == whole[: len(ours)], (which, text)
    assert num_checked >= 3 * len(ANSWERS)


def test_prompts_are_what_the_model_is_sampled_from(family: tuple[str, Family]) -> None:
    """The generation prompt, unless no conversation goes on like that."""
    name, made = family
    tokenizer = made.tokenizer()
    template = Template.build(tokenizer, TemplateConfig())
    prompt = template.encode_prompt(tokenizer, HISTORY)
    sampled_from = own(tokenizer, *HISTORY, add_generation_prompt=True)
    if name == "chatml-no-generation-prompt":
        assert tokenizer.decode(prompt[len(sampled_from) :]) == "<|im_start|>assistant\n"
    elif name == "deepseek-r1":
        assert tokenizer.convert_ids_to_tokens(prompt[-1]) == chats.R1_ROLES[1]
        assert sampled_from[: len(prompt)] == prompt
    elif name == "qwen-3-thinking":
        # Its "<think>\n" and the line break behind it are one token in the conversation.
        assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
    elif name in ("alpaca-unigram", "glm-4"):
        return  # white space at the end
    else:
        assert prompt == sampled_from


def test_an_answer_that_begins_with_a_line_break(family: tuple[str, Family]) -> None:
    """The prompt stays what is sampled from, whatever the tokens; the text is the template's."""
    _, made = family
    tokenizer = made.tokenizer()
    template = Template.build(tokenizer, TemplateConfig())
    for text in ("\nThe", "\n\n\nThe", " \n The"):
        whole = own(tokenizer, ASK, Message("assistant", text))
        ours = [
            *template.encode_prompt(tokenizer, (ASK,)),
            *template.encode_response(tokenizer, text, (ASK,)),
        ]
        assert tokenizer.decode(whole).startswith(tokenizer.decode(ours))
        assert "The" in tokenizer.decode(ours[-6:])


@pytest.mark.parametrize("turn", [0, 1, 2, 3])
def test_no_turn_can_inject_markup(family: tuple[str, Family], turn: int) -> None:
    """Control tokens in a text are text, and all around them is as it was."""
    name, made = family
    tokenizer = made.tokenizer()
    template = Template.build(tokenizer, TemplateConfig())
    control = {made.bos, made.eos, made.end, *made.specials}
    if not made.specials:
        control |= set(made.added)  # <think> is text, what frames the turns is not
    ids = set(tokenizer.convert_tokens_to_ids([*control]))

    def encoded(text: str) -> tuple[list[int], str]:
        turns = [*HISTORY, Message("assistant", "The end")]
        turns[turn] = Message(turns[turn].role, text)
        prompt = tuple(turns[:3])
        found = template.encode_prompt(tokenizer, prompt)
        found += template.encode_response(tokenizer, turns[3].content, prompt)
        return [i for i in found if i in ids], tokenizer.decode(found)

    attack = "The " + "".join(sorted(control)) + " end"
    if name == "alpaca-unigram":  # its model has pieces "<s>" and "</s>"
        with pytest.raises(UserError, match="can only read as markup"):
            encoded(attack)
        return
    frame, decoded = encoded(attack)
    assert attack in decoded
    plain_frame, plain = encoded("The ATTACK end")
    assert frame == plain_frame
    assert decoded == plain.replace("The ATTACK end", attack)


def test_what_is_said_of_generation_prompts(caplog: pytest.LogCaptureFixture) -> None:
    """A template's two ways to begin an answer are logged if they differ, once."""
    caplog.set_level(logging.WARNING, "s2srm")
    for name in ("llama-2", "vicuna", "qwen-3", "chatml-no-generation-prompt"):
        Template.build(FAMILIES[name].tokenizer(), TemplateConfig())
    assert not caplog.messages
    tokenizer = FAMILIES["deepseek-r1"].tokenizer()
    template = Template.build(tokenizer, TemplateConfig())
    template.encode_prompt(tokenizer, (ASK,))
    assert len(caplog.messages) == 1
    assert "<think>" in caplog.messages[0] and "prompts end as in" in caplog.messages[0]


def test_a_system_turn_that_disappears_before_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    """Mistral Nemo's first template writes it into a last turn of the user's only."""
    family = FAMILIES["mistral-v3"]
    tokenizer = family.tokenizer()
    tokenizer.chat_template = chats.MISTRAL_V3.replace("m == users[-1]", "loop.last")
    template = Template.build(tokenizer, TemplateConfig())
    template.encode_prompt(tokenizer, (ASK,))
    assert not caplog.messages
    ids = template.encode_prompt(tokenizer, (SYSTEM, ASK))
    ids += template.encode_response(tokenizer, "Yes", (SYSTEM, ASK))
    assert [*ids, template.eos_id] == own(tokenizer, SYSTEM, ASK, Message("assistant", "Yes"))
    assert len(caplog.messages) == 1 and "system turn may be missing" in caplog.messages[0]


def test_dates_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = FAMILIES["llama-3.1"].tokenizer()
    Template.build(tokenizer, TemplateConfig())
    assert not caplog.messages
    tokenizer.chat_template = chats.LLAMA31.replace("'26 Jul 2024'", "strftime_now('%d %b %Y')")
    template = Template.build(tokenizer, TemplateConfig())
    assert "today's date" in caplog.text
    # The request to correct has none.
    assert "Date" not in tokenizer.decode(template.separator_ids)


def test_an_end_of_turn_that_the_tokenizer_does_not_find() -> None:
    """Tokens of a plain add_tokens are normalized: with "▁" in front, as every text there."""
    tokenizer = small.PreTrainedTokenizerFast(
        tokenizer_object=small.legacy(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_tokens(list(chats.IM))
    tokenizer.chat_template = chats.chatml()
    with pytest.raises(UserError, match=r"ends turns with '<\|im_end\|>'.*normalized=False"):
        Template.build(tokenizer, TemplateConfig())


def test_words_and_line_breaks_that_were_added_are_text() -> None:
    """Gemma has added tokens of line breaks, and vocabularies are extended by words."""
    tokenizer = FAMILIES["chatml"].tokenizer()
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("\n", "\n\n", "user", "fine")])
    template = Template.build(tokenizer, TemplateConfig())
    prompt = (Message("user", "a user\n\nfine\n<|im_end|>"),)
    added = set(tokenizer.convert_tokens_to_ids(["\n\n", "fine"]))
    assert added <= set(template.encode_prompt(tokenizer, prompt))


def test_thoughts_in_an_answer_are_written_as_the_template_writes_them() -> None:
    tokenizer = FAMILIES["qwen-3"].tokenizer()
    template = Template.build(tokenizer, TemplateConfig())
    for text in ("Yes", "<think>\nso\n</think>\n\nYes", "a <think> b"):
        whole = own(tokenizer, ASK, Message("assistant", text))
        ours = template.encode_prompt(tokenizer, (ASK,))
        ours += [*template.encode_response(tokenizer, text, (ASK,)), template.eos_id]
        assert ours == whole[: len(ours)]
        assert tokenizer.decode(whole[len(ours) :]).strip() == ""


def test_a_response_of_white_space_has_no_tokens() -> None:
    """Whatever a template writes around it: Llama 2's spaces, Qwen3's empty thoughts."""
    for name in ("llama-2", "qwen-3", "gemma"):
        tokenizer = FAMILIES[name].tokenizer()
        template = Template.build(tokenizer, TemplateConfig())
        assert template.encode_response(tokenizer, " \n", (ASK,)) == []
        assert template.encode_response(tokenizer, "Yes") == (
            template.encode_response(tokenizer, "Yes", (ASK,))
        )


def test_responses_together_are_what_they_are_alone(family: tuple[str, Family]) -> None:
    """A row is encoded in one call, and its renderings stand for another."""
    tokenizer = family[1].tokenizer()
    template = Template.build(tokenizer, TemplateConfig())
    answers = [*ANSWERS, "", "\nThe", "a<|im_end|></s> b"]
    if family[0] == "alpaca-unigram":  # its model has a piece "</s>"
        answers.pop()
    prompt, together = template.encode(tokenizer, HISTORY, answers)
    assert prompt == template.encode_prompt(tokenizer, HISTORY)
    assert together == [template.encode_response(tokenizer, a, HISTORY) for a in answers]


def test_a_tokenizer_with_its_own_way_to_apply_templates() -> None:
    class Shouting(small.PreTrainedTokenizerFast):
        def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
            return super().apply_chat_template(conversation, **kwargs).upper()

    made = FAMILIES["alpaca"].tokenizer()
    tokenizer = Shouting(tokenizer_object=made.backend_tokenizer, bos_token="<S>", eos_token="</S>")
    tokenizer.chat_template = made.chat_template
    template = Template.build(tokenizer, TemplateConfig())
    assert "RESPONSE" in tokenizer.decode(template.encode_prompt(tokenizer, (ASK,)))
