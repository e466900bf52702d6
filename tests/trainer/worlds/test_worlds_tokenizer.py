"""The word-level tokenizer: unknown words, whitespace, bad vocabularies, saving."""

import pytest
from transformers import AutoTokenizer

from s2srm.worlds.tokenizer import unique_words, word_tokenizer


def test_special_tokens_come_first_and_nothing_is_added() -> None:
    tokenizer = word_tokenizer(["a", "b"])
    assert tokenizer.convert_ids_to_tokens(range(6)) == [
        "<pad>",
        "<eos>",
        "<unk>",
        "<fix>",
        "a",
        "b",
    ]
    assert tokenizer("b a")["input_ids"] == [5, 4]
    assert tokenizer.bos_token_id is None


def test_unknown_words_and_odd_whitespace() -> None:
    tokenizer = word_tokenizer(["a", "b"])
    assert tokenizer("  a\n\tzebra  b ")["input_ids"] == [4, tokenizer.unk_token_id, 5]
    assert tokenizer("")["input_ids"] == []


def test_the_separator_is_an_ordinary_word() -> None:
    tokenizer = word_tokenizer(["a"])
    ids = tokenizer("a <fix> a")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a <fix> a"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "a <fix> a"


def test_punctuation_keeps_its_spaces_when_decoded() -> None:
    tokenizer = word_tokenizer(["a", ".", ",", "?"])
    assert tokenizer.decode(tokenizer("a , a . a ?")["input_ids"]) == "a , a . a ?"


def test_saved_and_loaded(tmp_path) -> None:
    word_tokenizer(["a", "b", "."]).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("b . a")["input_ids"] == [5, 6, 4]
    assert loaded.decode([5, 6, 4]) == "b . a"
    assert loaded.eos_token == "<eos>" and loaded.pad_token == "<pad>"


@pytest.mark.parametrize("words", [["a", ""], ["two words"], ["a", "b", "a"], ["<eos>"]])
def test_bad_vocabularies(words: list[str]) -> None:
    with pytest.raises(ValueError, match="word"):
        word_tokenizer(words)


def test_unique_words_keep_their_order() -> None:
    assert unique_words("b a b", "", "c a") == ["b", "a", "c"]
