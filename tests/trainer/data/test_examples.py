"""Segments by hand, and the limits on length with their messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import small_tokenizers as small
from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase

from s2srm.config import DataConfig, TemplateConfig
from s2srm.data.examples import (
    rm_segments,
    scored_segment,
    sft_segment,
    tokenise_demonstrations,
    tokenise_preferences,
    tokenise_prompts,
)
from s2srm.data.schema import Demonstration, Message, Preference, Prompt
from s2srm.data.templates import Template
from s2srm.errors import UserError
from s2srm.packing import pack

EOS, SEP = 1, 3
CFG = DataConfig(path="rows.jsonl")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return small.words()


@pytest.fixture
def template(tokenizer: PreTrainedTokenizerBase) -> Template:
    return Template.build(tokenizer, TemplateConfig(separator="<fix>"))


def test_sft_predicts_response_and_eos(template: Template) -> None:
    segment = sft_segment(template, [4, 5], [6, 7])
    assert (list(segment.tokens), segment.start) == ([4, 5, 6, 7, EOS], 2)
    assert pack([segment]).targets.tolist() == [6, 7, EOS]


def test_rm_segments(template: Template) -> None:
    correction, identity = rm_segments(template, [4], [6, 7], [8], 2.0, 0.5)
    assert list(correction.tokens) == [4, 8, SEP, 6, 7, EOS]
    assert list(identity.tokens) == [4, 6, 7, SEP, 6, 7, EOS]
    assert (correction.start, identity.start) == (3, 4)
    assert (correction.weight, identity.weight) == (2.0, 0.5)
    batch = pack([correction, identity])
    assert batch.targets.tolist() == [6, 7, EOS] * 2
    assert batch.weights.tolist() == [2.0] * 3 + [0.5] * 3


def test_rm_segments_with_a_weight_of_zero_and_below(template: Template) -> None:
    assert [s.weight for s in rm_segments(template, [4], [6], [8], 1.0, 0.0)] == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"got 1\.0 and -0\.5"):
        rm_segments(template, [4], [6], [8], 1.0, -0.5)


def test_scored_segment_is_what_was_sampled() -> None:
    finished, truncated = scored_segment([4, 5], [6, EOS]), scored_segment([4, 5], [6])
    assert (list(finished.tokens), finished.start) == ([4, 5, 6, EOS], 2)
    assert pack([truncated]).targets.tolist() == [6]


def test_ids_of_a_row(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    row = Preference("tell me", "a story", "story .", "f:1")
    (found,), skipped = tokenise_preferences([row], tokenizer, template, CFG, None)
    assert (found.prompt, found.chosen, found.rejected, found.where) == (
        [4, 5],
        [6, 7],
        [7, 9],
        "f:1",
    )
    assert skipped == 0
    (demo,), _ = tokenise_demonstrations(
        [Demonstration("tell", "me", "f:1")], tokenizer, template, CFG, None
    )
    assert (demo.prompt, demo.response) == ([4], [5])
    (prompt,), _ = tokenise_prompts([Prompt("tell", "f:1")], tokenizer, template, CFG, None)
    assert prompt.prompt == [4]


@pytest.mark.parametrize(
    ("limits", "model_max", "message"),
    [
        ({"max_prompt_tokens": 3}, None, "the prompt has 4 tokens, over data.max_prompt_tokens 3"),
        (
            {"max_response_tokens": 3},
            None,
            "the rejected text has 4 tokens with its end of sequence, over "
            "data.max_response_tokens 3",
        ),
        # 4 of the prompt, 3 of the rejected response on both sides, separator, EOS
        (
            {},
            11,
            "prompt, response, separator and correction take 12 positions, over the model's 11",
        ),
    ],
)
def test_long_rows(
    limits: dict[str, int],
    model_max: int | None,
    message: str,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
) -> None:
    long = Preference("tell me a story", "once .", "a story .", "f:7")
    fits = Preference("tell me", "once", "story", "f:8")
    cfg = replace(CFG, **limits)
    with pytest.raises(UserError) as caught:
        tokenise_preferences([long, fits], tokenizer, template, cfg, model_max)
    assert str(caught.value) == f"f:7: {message} (data.on_long_row: skip leaves out such rows)"
    cfg = replace(cfg, on_long_row="skip")
    rows, skipped = tokenise_preferences([long, fits, long], tokenizer, template, cfg, model_max)
    assert ([r.where for r in rows], skipped) == (["f:8"], 2)
    with pytest.raises(UserError, match=r"all 1 rows of 'rows.jsonl' were skipped; the first: f:7"):
        tokenise_preferences([long], tokenizer, template, cfg, model_max)


def test_lengths_at_the_limit_are_allowed(
    tokenizer: PreTrainedTokenizerBase, template: Template
) -> None:
    row = Preference("tell me a story", "once .", "a story .", "f:7")
    cfg = replace(CFG, max_prompt_tokens=4, max_response_tokens=4)
    assert len(tokenise_preferences([row], tokenizer, template, cfg, 12)[0]) == 1
    # A scalar RM reads 4 + 3 + 1 positions of the same row.
    rows, _ = tokenise_preferences([row], tokenizer, template, cfg, 8, layout="response")
    assert len(rows) == 1
    with pytest.raises(UserError, match="prompt and response take 8 positions, over the model's 7"):
        tokenise_preferences([row], tokenizer, template, cfg, 7, layout="response")


def test_the_bound_covers_what_is_trained_and_scored(
    tokenizer: PreTrainedTokenizerBase, template: Template
) -> None:
    row = Preference("tell me a story", "once . once .", "a", "f:7")
    (ids,), _ = tokenise_preferences([row], tokenizer, template, CFG, 14)
    segments = rm_segments(template, ids.prompt, ids.chosen, ids.rejected)
    assert max(len(s.tokens) for s in segments) == 14


def test_room_after_the_prompt(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    prompts = [Prompt("tell me", "f:1")]
    assert len(tokenise_prompts(prompts, tokenizer, template, CFG, 10, reserve=8)[0]) == 1
    with pytest.raises(UserError, match="prompt and 9 tokens after it take 11 positions"):
        tokenise_prompts(prompts, tokenizer, template, CFG, 10, reserve=9)


@pytest.mark.parametrize("setting", ["error", "skip"])
def test_rows_that_the_template_or_tokenizer_refuses_are_bad_rows(setting: Any) -> None:
    tokenizer = small.gemma()
    template = Template.build(tokenizer, TemplateConfig())
    refused = Prompt((Message("user", "Hi"), Message("user", "Hi")), "f:3")
    cfg = replace(CFG, on_bad_row=setting)
    rows = [refused, Prompt("Hi", "f:4")]
    if setting == "error":
        with pytest.raises(UserError, match=r"f:3: .*must alternate.*data\.on_bad_row"):
            tokenise_prompts(rows, tokenizer, template, cfg, None)
    else:
        found, skipped = tokenise_prompts(rows, tokenizer, template, cfg, None)
        assert ([r.where for r in found], skipped) == (["f:4"], 1)


def gemma_like(backend: Any) -> PreTrainedTokenizerBase:
    tokenizer = small.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<end_of_turn>"
    )
    tokenizer.chat_template = small.GEMMA
    return tokenizer


def lowercasing() -> PreTrainedTokenizerBase:
    backend = small.byte_level_gpt2()
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return gemma_like(backend)


@pytest.mark.parametrize(
    ("build", "chosen", "rejected"),
    [
        (small.plain, "yes", " yes"),  # the template's own space, or the response's
        (small.gemma, "yes", "yes \n"),  # trimmed
        (lowercasing, "Yes", "yes"),
        (lowercasing, "e\u0301", "\u00e9"),
    ],
)
@pytest.mark.parametrize("layout", ["rm", "response"])
def test_pairs_that_are_equal_as_tokens_are_bad_rows(
    build: Any, chosen: str, rejected: str, layout: Any
) -> None:
    tokenizer = build()
    template = Template.build(tokenizer, TemplateConfig())
    rows = [Preference("Hi", chosen, rejected, "f:3"), Preference("Hi", "yes", "no", "f:4")]
    with pytest.raises(UserError, match=r"f:3: .* have the same tokens \(data\.on_bad_row"):
        tokenise_preferences(rows, tokenizer, template, CFG, None, layout)
    cfg = replace(CFG, on_bad_row="skip")
    found, skipped = tokenise_preferences(rows, tokenizer, template, cfg, None, layout)
    assert ([r.where for r in found], skipped) == (["f:4"], 1)


@pytest.mark.parametrize("build", [small.plain, small.chatml])
def test_a_prompt_that_ends_with_the_assistants_turn_is_a_bad_row(build: Any) -> None:
    tokenizer = build()
    template = Template.build(tokenizer, TemplateConfig())
    prompt = (Message("user", "Hi"), Message("assistant", "Hello"))
    with pytest.raises(UserError, match="f:3: the prompt's last turn is the assistant's"):
        tokenise_prompts([Prompt(prompt, "f:3")], tokenizer, template, CFG, None)


def test_a_template_that_fails_on_one_row_names_it() -> None:
    tokenizer = small.chatml()
    tokenizer.chat_template = "{% set x = 1 // (messages[0]['content'] | length - 2) %}" + (
        small.CHATML
    )
    template = Template.build(tokenizer, TemplateConfig())
    rows = [Prompt("Hello", "f:3"), Prompt("Hi", "f:4")]
    with pytest.raises(UserError, match=r"f:4: .* fails on this prompt: ZeroDivisionError: .*data"):
        tokenise_prompts(rows, tokenizer, template, CFG, None)


def test_text_without_tokens_is_a_bad_row() -> None:
    """White space that a word tokenizer drops would leave an empty response."""
    tokenizer = small.words()
    template = Template.build(tokenizer, TemplateConfig(separator="<fix>"))
    with pytest.raises(UserError, match="f:2: the prompt gives no tokens"):
        tokenise_prompts([Prompt("\u00a0", "f:2")], tokenizer, template, CFG, None)
    with pytest.raises(UserError, match="f:2: the response text gives no tokens"):
        tokenise_demonstrations(
            [Demonstration("tell", "\u00a0", "f:2")], tokenizer, template, CFG, None
        )


def test_eos_string_in_a_response_is_no_end() -> None:
    tokenizer = small.chatml()
    template = Template.build(tokenizer, TemplateConfig())
    row = Preference("Hi", "bye<|im_end|>", "bye", "f:1")
    (ids,), _ = tokenise_preferences([row], tokenizer, template, CFG, None)
    assert template.eos_id not in ids.chosen
    assert sft_segment(template, ids.prompt, ids.chosen).tokens[-1] == template.eos_id
