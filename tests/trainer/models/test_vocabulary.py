"""Every id that the policy can sample has a row in every other model."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

from s2srm.errors import UserError
from s2srm.models.vocabulary import check_vocabularies

WORDS = {f"w{i}": i for i in range(400)}
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(WORDS, unk_token="w0")))


def rows(count: int) -> LlamaConfig:
    return LlamaConfig(vocab_size=count)


@pytest.mark.parametrize("policy, reader", [(400, 400), (512, 512), (400, 512)])
def test_equal_or_larger_readers_pass(policy: int, reader: int) -> None:
    check_vocabularies(
        TOKENIZER, "policy.path p", rows(policy), {"reward.model.path r": rows(reader)}
    )


def test_a_smaller_reader_is_refused_with_the_remedy() -> None:
    readers = {"reference a": rows(512), "reward.model.path r": rows(400)}
    with pytest.raises(
        UserError, match=r"^reward\.model\.path r: .*400 rows.*512.*400 tokens.*shrink"
    ):
        check_vocabularies(TOKENIZER, "policy.path p", rows(512), readers)
    with pytest.raises(UserError, match=r"enlarge it once with resize_token_embeddings\(400\)"):
        check_vocabularies(TOKENIZER, "policy.path p", rows(400), {"critic.path c": rows(390)})
