"""Tokenizers of a few hundred entries, each with one trait of a family that is used for real."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SHARED = Path(__file__).resolve().parents[4] / "shared"
CORPUS = [
    "Improve your last response. If it is already as good as it can be, repeat it unchanged.",
    "Human: How are you today? Assistant: I am fine, thank you for asking. TL;DR: a summary",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face. system user model",
]

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
