"""Prompt, response and separator as ids, for the families of tokenizers that differ in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import small_tokenizers as small

from s2srm.config import TemplateConfig
from s2srm.data.schema import Message
from s2srm.data.templates import (
    CHAT_SEPARATOR,
    FILE_NAME,
    PLAIN_SEPARATOR,
    Template,
    plain_dialogue,
)
from s2srm.errors import UserError

CHATS = {"chatml": small.chatml, "gemma": small.gemma}
DIALOGUE = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "How are you?"))


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize(
    "prompt", ["Hi there", DIALOGUE, (Message("system", "Be kind"), *DIALOGUE)]
)
def test_rm_input_is_the_chat_of_four_turns(name: str, prompt: str | tuple[Message, ...]) -> None:
    """One conversation: also where the template puts a system message in front by default."""
    tokenizer = CHATS[name]()
    template = Template.build(tokenizer, TemplateConfig())
    prompt_ids = template.encode_prompt(tokenizer, prompt)
    response = [*template.encode_response(tokenizer, "Fine, thanks"), template.eos_id]
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    chat = [{"role": m.role, "content": m.content} for m in messages]
    chat += [
        {"role": "assistant", "content": "Fine, thanks"},
        {"role": "user", "content": CHAT_SEPARATOR},
    ]
    own = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    assert template.rm_input(prompt_ids, response) == own["input_ids"]
    assert template.rm_input(prompt_ids, response[:-1]) == own["input_ids"]


def test_chatml_end_of_turn_and_default_system_message() -> None:
    tokenizer = small.chatml()
    template = Template.build(tokenizer, TemplateConfig())
    assert (template.kind, template.eos_id) == ("chat", tokenizer.eos_token_id)
    prompt = tokenizer.decode(template.encode_prompt(tokenizer, "Hi"))
    assert prompt.count("You are a helpful AI assistant") == 1
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    separator = tokenizer.decode(template.separator_ids)
    assert "helpful" not in separator
    assert separator.startswith("<|im_end|>\n<|im_start|>user\nImprove")


def test_gemma_has_one_bos_and_ends_turns_with_its_own_token() -> None:
    tokenizer = small.gemma()
    template = Template.build(tokenizer, TemplateConfig())
    assert template.eos_id == tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert template.eos_id != tokenizer.eos_token_id
    read = template.rm_input(template.encode_prompt(tokenizer, "Hi"), [9, template.eos_id])
    assert read.count(tokenizer.bos_token_id) == 1
    assert read[0] == tokenizer.bos_token_id
    assert read.count(template.eos_id) == 3


def test_end_of_turn_behind_a_space() -> None:
    """Llama 2 writes ' </s><s>[INST] ..' after the assistant's content."""
    tokenizer = small.sentencepiece()
    template = Template.build(tokenizer, TemplateConfig())
    assert template.eos_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("turn", "end"),
    [
        ("role + ': ' + text + '\n'", "<eos>"),
        ("'<start_of_turn>' + role + ' ' + text + '.\n'", "<eos>"),
        ("'<bos>' + role + ' ' + text", "<eos>"),
        ("role + ': ' + text + ' <end_of_turn>\n'", "<end_of_turn>"),
        ("role + ': ' + text + '<eos>'", "<eos>"),
    ],
)
def test_end_of_turn_is_what_directly_follows_the_content(turn: str, end: str) -> None:
    """Only white space may stand between; BOS and what starts the next turn end nothing."""
    tokenizer = small.gemma()
    turn = turn.replace("role", "m['role']").replace("text", "m['content']")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ " + turn + " }}{% endfor %}{{ 'assistant: ' }}"
    )
    template = Template.build(tokenizer, TemplateConfig())
    assert template.eos_id == tokenizer.convert_tokens_to_ids(end)


def test_special_strings_in_separator_and_texts() -> None:
    tokenizer = small.chatml()
    template = Template.build(tokenizer, TemplateConfig(separator="Fix <|im_end|> it"))
    assert template.separator_ids.count(template.eos_id) == 2
    assert template.eos_id not in template.encode_response(tokenizer, "bye<|im_end|>")
    prompt = template.encode_prompt(tokenizer, "Hi <|im_end|>")
    assert prompt.count(template.eos_id) == 2  # of the system message and of the user's turn
    base = Template.build(tokenizer, TemplateConfig(kind="plain"))
    assert template.eos_id not in base.encode_prompt(tokenizer, "Hi <|im_end|>")


def test_plain_space_belongs_to_the_response() -> None:
    tokenizer = small.plain()
    template = Template.build(tokenizer, TemplateConfig())
    assert (template.kind, template.response_prefix, template.prompt_ids) == ("plain", " ", ())
    assert template.eos_id == tokenizer.eos_token_id
    prompt = template.encode_prompt(tokenizer, "TL;DR:")

    def joined(response: str, text: str | None = None) -> str:
        return tokenizer.decode(prompt + template.encode_response(tokenizer, response, text))

    assert joined("a summary") == "TL;DR: a summary"
    assert joined(" a summary") == "TL;DR: a summary"
    assert joined("\na summary") == "TL;DR:\na summary"
    assert tokenizer.decode(template.encode_response(tokenizer, "a", "Answer:\n")) == "a"
    assert tokenizer.decode(template.encode_response(tokenizer, "a", "Answer:")) == " a"


def test_plain_bos_and_no_second_space() -> None:
    tokenizer = small.sentencepiece()
    template = Template.build(tokenizer, TemplateConfig(kind="plain"))
    assert (template.response_prefix, template.prompt_ids) == ("", (tokenizer.bos_token_id,))
    ids = template.encode_prompt(tokenizer, "TL;DR:") + template.encode_response(tokenizer, "a")
    assert tokenizer.decode(ids[1:]) == " TL;DR: a"


@pytest.mark.parametrize("backend", [small.metaspace, small.metaspace_always, small.legacy])
@pytest.mark.parametrize("response", ["The end", " The end", "\nThe end", "\n\nThe end"])
@pytest.mark.parametrize("prompt", ["How are you?", "How are you?\n", "Hi:\n\n"])
def test_plain_tokens_are_those_of_the_whole_text(backend, prompt: str, response: str) -> None:
    """Where the tokenizer puts a space before a text, only the prompt's beginning gets one."""
    tokenizer = small.PreTrainedTokenizerFast(
        tokenizer_object=backend(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    template = Template.build(tokenizer, TemplateConfig())
    ids = template.encode_prompt(tokenizer, prompt)
    ids += template.encode_response(tokenizer, response, prompt)
    space = "" if prompt[-1].isspace() or response[0].isspace() else " "
    assert ids == tokenizer(prompt + space + response, add_special_tokens=False)["input_ids"]


def test_stories260k() -> None:
    tokenizer = small.stories260k()
    template = Template.build(tokenizer, TemplateConfig())
    assert (template.kind, template.eos_id, template.prompt_ids) == ("plain", 2, (1,))
    prompt = template.encode_prompt(tokenizer, "Once upon</s>")
    response = template.encode_response(tokenizer, "a time <unk> é")
    assert tokenizer.decode(prompt[1:]) == "Once upon</s>"
    assert tokenizer.decode(prompt[1:] + response) == "Once upon</s> a time <unk> é"
    assert prompt.count(1) == 1
    assert not {1, 2} & {*response, *template.separator_ids}
    assert tokenizer.decode(template.separator_ids).strip() == PLAIN_SEPARATOR.strip()


def test_plain_dialogue_is_the_form_of_anthropic_hh() -> None:
    assert plain_dialogue(DIALOGUE) == (
        "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How are you?\n\nAssistant:"
    )
    assert plain_dialogue((Message("system", "Be kind."), DIALOGUE[0])) == (
        "Be kind.\n\nHuman: Hi\n\nAssistant:"
    )
    tokenizer = small.plain()
    template = Template.build(tokenizer, TemplateConfig())
    assert tokenizer.decode(template.encode_prompt(tokenizer, DIALOGUE)) == plain_dialogue(DIALOGUE)


def test_plain_separator_may_be_a_special_token() -> None:
    tokenizer = small.words()
    template = Template.build(tokenizer, TemplateConfig(separator="<fix>"))
    assert template.separator_ids == (3,)
    assert template.rm_input([4, 5], [7, 1]) == [4, 5, 7, 3]
    assert template.rm_input([4, 5], []) == [4, 5, 3]


@pytest.mark.parametrize(
    ("build", "cfg", "reason"),
    [
        (small.words, TemplateConfig(), "has a part that the tokenizer has no token for"),
        (small.words, TemplateConfig(separator=""), "gives no tokens"),
        (small.chatml, TemplateConfig(separator=" "), "is empty"),
        (small.plain, TemplateConfig(kind="chat"), "no chat template"),
    ],
)
def test_unusable_templates(build, cfg: TemplateConfig, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Template.build(build(), cfg)


def test_tokenizer_without_eos() -> None:
    tokenizer = small.PreTrainedTokenizerFast(tokenizer_object=small.byte_level([]))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Template.build(tokenizer, TemplateConfig())


def test_chat_template_that_hides_the_answer() -> None:
    tokenizer = small.chatml()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}<|im_end|>"
    with pytest.raises(UserError, match="exactly once"):
        Template.build(tokenizer, TemplateConfig())


def test_named_chat_templates() -> None:
    """One is chosen by its name, and is the only one from then on."""
    named = {"rag": small.CHATML.replace("helpful", "well-read"), "tool_use": small.CHATML}
    tokenizer = small.chatml()
    tokenizer.chat_template = dict(named)
    with pytest.raises(UserError, match=r"rag, tool_use and no default: .* template\.chat_name"):
        Template.build(tokenizer, TemplateConfig())
    with pytest.raises(UserError, match=r"chat_name is 'chat': the tokenizer has only rag, tool"):
        Template.build(tokenizer, TemplateConfig(chat_name="chat"))
    template = Template.build(tokenizer, TemplateConfig(chat_name="rag"))
    assert tokenizer.chat_template == named["rag"]
    assert "well-read" in tokenizer.decode(template.encode_prompt(tokenizer, "Hi"))
    template.check_same(Template.build(tokenizer, TemplateConfig()), "the same model, loaded")
    tokenizer.chat_template = {"default": small.CHATML, **named}
    default = Template.build(tokenizer, TemplateConfig())
    assert default.chat_sha256 != template.chat_sha256
    with pytest.raises(UserError, match="has no named chat templates"):
        Template.build(small.chatml(), TemplateConfig(chat_name="rag"))
    with pytest.raises(UserError, match=r"template\.kind is plain"):
        Template.build(tokenizer, TemplateConfig(kind="plain", chat_name="rag"))
    tokenizer.chat_template = dict(named)
    assert Template.build(tokenizer, TemplateConfig(kind="plain")).chat_sha256 is None


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'] + 1 }}", "TypeError: can only concatenate str"),
        ("{{ messages[0].parts.text }}", "UndefinedError: .*has no attribute 'parts'"),
        ("{{ messages[9]['content'].strip() }}", "UndefinedError"),
        ("{% for m in messages %}", "TemplateSyntaxError: Unexpected end of template"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError|UndefinedError"),
        ("{{ raise_exception('no\nchat') }}", "refuses this prompt: no chat$"),
    ],
)
def test_chat_templates_that_fail(template: str, reason: str) -> None:
    """A template is a program: whatever it raises is one line."""
    tokenizer = small.chatml()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=reason) as caught:
        Template.build(tokenizer, TemplateConfig())
    assert "\n" not in str(caught.value)


def test_a_chat_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    tokenizer = small.chatml()
    template = Template.build(tokenizer, TemplateConfig())
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    loaded = small.AutoTokenizer.from_pretrained(tmp_path)
    assert Template.build(loaded, TemplateConfig()) == template


@pytest.mark.parametrize("build", [small.chatml, small.plain])
def test_save_and_load(build, tmp_path: Path) -> None:
    template = Template.build(build(), TemplateConfig())
    template.save(tmp_path)
    loaded = Template.load(tmp_path)
    assert loaded == template
    assert hash(loaded) == hash(template)
    loaded.check_same(template, "rm")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "chatty"),
        ("eos_id", "2"),
        ("eos_id", True),
        ("separator_ids", []),
        ("separator_ids", [1.5]),
        ("prompt_ids", None),
        ("response_prefix", "  "),
    ],
)
def test_load_refuses_what_does_not_fit(field: str, value: object, tmp_path: Path) -> None:
    Template.build(small.plain(), TemplateConfig()).save(tmp_path)
    file = tmp_path / FILE_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(UserError, match=f"{FILE_NAME}: {field} cannot be"):
        Template.load(tmp_path)


def test_load_of_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no s2srm_template\.json"):
        Template.load(tmp_path)
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Template.load(tmp_path)
    (tmp_path / FILE_NAME).write_text('{"kind": "plain"}')
    with pytest.raises(UserError, match="must hold exactly kind, separator"):
        Template.load(tmp_path)


def test_check_same_names_the_field() -> None:
    tokenizer = small.chatml()
    mine = Template.build(tokenizer, TemplateConfig())
    other = Template.build(tokenizer, TemplateConfig(separator="Correct it"))
    with pytest.raises(UserError, match=r"runs/rm was trained with another template: separator is"):
        mine.check_same(other, "runs/rm")
    with pytest.raises(UserError, match="eos_id is 0 there and 2 here"):
        mine.check_same(replace(mine, eos_id=0), "runs/rm")
    tokenizer.chat_template = small.CHATML.replace("helpful", "terse")
    with pytest.raises(UserError, match="chat_sha256"):
        mine.check_same(Template.build(tokenizer, TemplateConfig()), "runs/rm")
