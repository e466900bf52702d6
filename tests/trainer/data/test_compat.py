"""The first difference between two tokenizers is named."""

from __future__ import annotations

import pytest
import small_tokenizers as small
from tokenizers import Tokenizer, models, normalizers

from s2srm.data.compat import check_same_tokenizer
from s2srm.errors import UserError


def difference(policy, other) -> str:
    with pytest.raises(UserError) as caught:
        check_same_tokenizer(policy, other, "reward.model.path runs/rm")
    return str(caught.value)


def word_level(words: list[str], **special: str):
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="u"))
    return small.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="u", **special)


@pytest.mark.parametrize("build", [small.chatml, small.gemma, small.plain, small.words])
def test_equal_tokenizers_pass(build) -> None:
    check_same_tokenizer(build(), build(), "rm")


def test_padding_and_chat_template_are_not_compared() -> None:
    other = small.chatml()
    other.pad_token = "<|endoftext|>"
    other.chat_template = None
    check_same_tokenizer(small.chatml(), other, "rm")


def test_size() -> None:
    other = small.chatml()
    other.add_tokens(["<think>"])
    assert difference(small.chatml(), other) == (
        "reward.model.path runs/rm does not have the tokenizer of the policy: "
        f"it has {len(other)} tokens, the policy has {len(other) - 1} (only one has '<think>')"
    )


def test_first_token_that_differs() -> None:
    policy, other = word_level(["u", "a", "b", "c"]), word_level(["u", "b", "a", "c"])
    assert "token 'a' has id 2 in it, and id 1 in the policy" in difference(policy, other)
    missing = word_level(["u", "a", "b", "d"])
    assert "token 'c' has no id in it, and id 3 in the policy" in difference(policy, missing)


def test_special_token() -> None:
    policy = word_level(["u", "a", "b"], eos_token="a")
    other = word_level(["u", "a", "b"], eos_token="b")
    assert "its eos_token is 'b', that of the policy is 'a'" in difference(policy, other)


def test_same_vocabulary_but_other_pieces() -> None:
    other = small.chatml()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert "is encoded differently" in difference(small.chatml(), other)
