"""A word-level tokenizer made from a list of words.

Text is split at whitespace and each word is one token; decoding joins the words with spaces, so
canonical text (single spaces) survives a round trip. There is no beginning-of-sequence token:
prompts begin with a fixed word. The separator is an ordinary word, not a special token, so that it
shows up in decoded text like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK, SEPARATOR = "<pad>", "<eos>", "<unk>", "<fix>"


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Tokenizer over <pad>, <eos>, <unk>, <fix> and `words`, ids in that order.

    ValueError if a word is repeated, empty, or holds whitespace.
    """
    vocabulary = [PAD, EOS, UNK, SEPARATOR, *words]
    for word in vocabulary:
        if not word or len(word.split()) != 1:
            raise ValueError(f"word {word!r} is empty or holds whitespace")
    ids = {word: i for i, word in enumerate(vocabulary)}
    if len(ids) != len(vocabulary):
        repeated = sorted({word for word in vocabulary if vocabulary.count(word) > 1})
        raise ValueError(f"words given twice: {' '.join(repeated)}")
    backend = Tokenizer(WordLevel(ids, unk_token=UNK))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=256,
    )


def unique_words(*texts: str) -> list[str]:
    """The different words of some texts, in order of first appearance."""
    return list(dict.fromkeys(word for text in texts for word in text.split()))
