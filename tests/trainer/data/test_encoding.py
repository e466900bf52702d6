"""User text never becomes a control token; what the template writes always does."""

from __future__ import annotations

import pytest
import small_tokenizers as small
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerBase

from s2srm.data.encoding import (
    control_tokens,
    encode_continuing,
    encode_markup,
    encode_rendered,
    encode_text,
    mask_control,
)
from s2srm.errors import UserError

CHATS = {"chatml": small.chatml, "gemma": small.gemma, "sentencepiece": small.sentencepiece}


@pytest.mark.parametrize("name", CHATS)
def test_special_strings_in_text_stay_text(name: str) -> None:
    tokenizer = CHATS[name]()
    for token, token_id in control_tokens(tokenizer).ids.items():
        text = f"before {token} after{token}"
        ids = encode_text(tokenizer, text)
        assert token_id not in ids
        assert tokenizer.decode(ids).strip() == text
        assert token_id in encode_markup(tokenizer, text)


def test_encoding_of_text_leaves_the_tokenizer_as_it_was() -> None:
    tokenizer = small.chatml()
    before = tokenizer("a<|im_end|>")["input_ids"]
    encode_text(tokenizer, "a<|im_end|>")
    assert tokenizer("a<|im_end|>")["input_ids"] == before


TEXT = "<|im_start|>user\nFine — спасибо 🙂\r\n\n  indented.\tAnd a <think> tag?<|im_end|>\n x"


@pytest.mark.parametrize(
    "backend",
    [small.byte_level_gpt2, small.digits, small.metaspace, small.legacy, small.prefix_space],
)
@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"lstrip": True}, {"normalized": True}])
def test_masked_text_is_encoded_as_the_tokenizer_would(backend, flags: dict[str, bool]) -> None:
    """The way over other names for control tokens gives the tokenizer's own ids."""
    tokenizer = small.PreTrainedTokenizerFast(tokenizer_object=backend())
    if backend is small.legacy and flags.get("normalized"):
        return  # such a token is found after a space only, see below
    tokens = [AddedToken(t, **flags) for t in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(tokens, special_tokens=True)
    control = control_tokens(tokenizer)
    plain = encode_markup(tokenizer, TEXT)
    masked = TEXT.replace("F", "\U000f0000")
    texts = [TEXT, masked, TEXT]
    assert encode_rendered(tokenizer, texts, {"\U000f0000": "F"}, control) == [plain] * 3
    (ids,) = encode_rendered(tokenizer, [masked], {"\U000f0000": "<|im_end|>"}, control)
    assert ids.count(control.ids["<|im_end|>"]) == 1
    assert "<|im_end|>ine" in tokenizer.decode(ids)


def test_masks_avoid_private_use_characters_of_the_text() -> None:
    control = control_tokens(small.chatml())
    contents = ["\U000f0000\U000f0001 <|im_end|>", "<|im_end|><|im_start|>", "none"]
    masked, masks = mask_control(control, contents)
    assert sorted(masks.values()) == ["<|im_end|>", "<|im_start|>"]
    assert not any("<|im" in text for text in masked)
    assert not any(mask in text for mask in masks for text in contents)
    assert mask_control(control, ["none"]) == (["none"], {})


def test_a_normalizer_cannot_make_a_control_token() -> None:
    """A lowercasing tokenizer would read "<EOS>" as its token <eos>."""
    backend = small.byte_level_gpt2()
    backend.normalizer = normalizers.Lowercase()
    tokenizer = small.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens([AddedToken("<eos>", normalized=True)], special_tokens=True)
    control = control_tokens(tokenizer)
    eos = control.ids["<eos>"]
    assert encode_markup(tokenizer, "say <EOS>").count(eos) == 1
    encoded = encode_rendered(tokenizer, ["say <EOS>", "say <EOS><eos>"], {}, control)
    assert [ids.count(eos) for ids in encoded] == [0, 1]
    assert eos not in encode_text(tokenizer, "say <EOS>")


def test_control_tokens_that_the_tokenizer_misses() -> None:
    """A normalizer that puts "▁" before texts puts it before the tokens that it looks for, too."""
    tokenizer = small.PreTrainedTokenizerFast(tokenizer_object=small.legacy())
    tokenizer.add_tokens([AddedToken("<end>", normalized=True)], special_tokens=True)
    assert control_tokens(tokenizer).ids["<end>"] not in encode_markup(tokenizer, "a<end>")
    with pytest.raises(UserError, match="add them with normalized=False"):
        masks = {"\U000f0000": "<end>"}
        encode_rendered(tokenizer, ["\U000f0000<end>"], masks, control_tokens(tokenizer))


@pytest.mark.parametrize("backend", [small.metaspace, small.metaspace_always, small.legacy])
@pytest.mark.parametrize("text", ["word", " word", "\nword", "\n\n1"])
def test_a_continuation_has_nothing_put_in_front(backend, text: str) -> None:
    tokenizer = small.PreTrainedTokenizerFast(tokenizer_object=backend())
    ids = encode_continuing(lambda t: encode_text(tokenizer, t), text)
    assert tokenizer.decode([*encode_text(tokenizer, "a"), *ids]).strip() == "a" + text


def test_a_continuation_that_nothing_can_stand_before() -> None:
    with pytest.raises(UserError, match="no tokens of their own for 'x' inside a text"):
        encode_continuing(lambda text: [len(text)], "x")


def test_added_tokens_that_are_not_special_are_text() -> None:
    tokenizer = small.chatml()
    tokenizer.add_tokens(["<think>"])
    assert len(encode_text(tokenizer, "<think>")) == 1


def test_unknown_words_are_no_control_token() -> None:
    tokenizer = small.words()
    assert encode_text(tokenizer, "tell zebra") == [4, tokenizer.unk_token_id]


def test_a_word_that_is_a_control_token_is_refused() -> None:
    with pytest.raises(UserError, match="contains '<eos>'"):
        encode_text(small.words(), "tell <eos>")


def test_a_tokenizer_without_special_tokens() -> None:
    tokenizer = small.PreTrainedTokenizerFast(tokenizer_object=small.byte_level([]))
    assert control_tokens(tokenizer).pattern.split("a b") == ["a b"]
    assert tokenizer.decode(encode_text(tokenizer, "a b")) == "a b"


@pytest.mark.parametrize("text", ["", "\r\n", "naïve 日本 🙂", "a\x00b", " lead and trail  "])
def test_text_comes_back(text: str) -> None:
    tokenizer: PreTrainedTokenizerBase = small.chatml()
    ids = encode_text(tokenizer, text)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
