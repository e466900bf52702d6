"""Tokenizers of a few hundred entries, each with one trait of a family that is used for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SHARED = Path(__file__).resolve().parents[4] / "shared"
CORPUS = [
    "Improve your last response. If it is already as good as it can be, repeat it unchanged.",
    "Human: How are you today? Assistant: I am fine, thank you for asking. TL;DR: a summary",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face. system user model",
]

# With what chats are written in, so that line breaks and spaces have tokens to run into.
CHATS = [
    *CORPUS,
    "[ Be kind.\n\nHow are you? ] I am well. [ Yes ] The end ] a USER: Hi ASSISTANT: Yes, it is.",
    "GPT4 Correct User: The Assistant: It is. ### Instruction:\nTell me.\n\n### Response:\n\nYes.",
    "The list:\n- a\n- b\n\n\n(1) Yes\n\n 2 3\n> \nHi\n> \nUser: I\n\nAssistant: a lot: yes",
] * 3

# SmolLM2's: a default system message appears unless there is one.
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Gemma 3's, texts only: BOS in the template, contents trimmed, speakers that must alternate.
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim }}{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""


def byte_level(specials: list[str], vocab_size: int = 400) -> Tokenizer:
    """A byte-level BPE, which can write any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _trained(backend: Tokenizer, specials: list[str], pieces: list[str] | None = None) -> Tokenizer:
    trainer = BpeTrainer(
        vocab_size=700,
        special_tokens=specials,
        initial_alphabet=[] if pieces else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(pieces or CHATS, trainer)
    return backend


def byte_level_gpt2() -> Tokenizer:
    """GPT-2's pieces: a space belongs to the word behind it, line breaks stand alone."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _trained(backend, [])


def prefix_space() -> Tokenizer:
    """GPT-2's pieces, and a space in front of every piece of text between special tokens."""
    backend = byte_level_gpt2()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


def digits() -> Tokenizer:
    """Llama 3's and Qwen's pieces: line breaks go together, also with punctuation before them."""
    pattern = (
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return _trained(backend, [])


def _byte_fallback(
    pre_tokenizer: PreTokenizer | None, normalizer: Normalizer | None = None
) -> Tokenizer:
    """sentencepiece's BPE: words begin with "▁", bytes for what has no piece."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)|\n"), "isolated")
    specials = ["<unk>", "<s>", "</s>"]
    pieces = [text.replace(" ", "▁") for text in CHATS]
    _trained(backend, [*specials, *(f"<0x{i:02X}>" for i in range(256))], pieces)
    data = json.loads(backend.to_str())
    # The bytes are ordinary entries, and the words were only for training.
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] in specials]
    data["pre_tokenizer"] = None
    backend = Tokenizer.from_str(json.dumps(data))
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def metaspace() -> Tokenizer:
    """Mistral's and TinyLlama's: "▁" in front of the first word of a whole text only."""
    return _byte_fallback(pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def metaspace_always() -> Tokenizer:
    """ "▁" in front of every piece of text between special tokens."""
    return _byte_fallback(pre_tokenizers.Metaspace(prepend_scheme="always", split=True))


def legacy() -> Tokenizer:
    """Llama 2's older kind: a normalizer puts "▁" before every piece of text."""
    return _byte_fallback(
        None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    )


def gemma_pieces() -> Tokenizer:
    """Gemma's: "▁" for a space, and nothing in front."""
    return _byte_fallback(
        pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")
    )


def unigram() -> Tokenizer:
    """Like T5: line breaks are spaces, "▁" before every piece of text."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator(CHATS, trainer)
    return backend


def chatml() -> PreTrainedTokenizerBase:
    """Like SmolLM2: ChatML, pad is EOS is end of turn, no BOS added."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def gemma() -> PreTrainedTokenizerBase:
    """Like Gemma 3: BOS added by default and in the template, EOS is not the end of turn."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    backend = byte_level(specials)
    backend.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = GEMMA
    return tokenizer


def plain() -> PreTrainedTokenizerBase:
    """Like GPT-2: one special token that is BOS, EOS and unk; no chat template."""
    name = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level([name]), bos_token=name, eos_token=name, unk_token=name
    )


def words() -> PreTrainedTokenizerBase:
    """Whole words with an unknown token; the separator <fix> is a special token."""
    vocab = ["<pad>", "<eos>", "<unk>", "<fix>", "tell", "me", "a", "story", "once", "."]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(t, special=True) for t in vocab[:4]])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def sentencepiece() -> PreTrainedTokenizerBase:
    """Like Llama 2: every text gets a space in front; [INST] is text, and </s> ends a turn."""
    backend = byte_level(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Prepend(" ")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


def stories260k() -> PreTrainedTokenizerBase:
    """The real tokenizer beside the checkout, if it is there."""
    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("shared/models/stories260k not beside the checkout")
    return AutoTokenizer.from_pretrained(folder)
