"""Rows -> token ids, once; token ids -> the sequences that are trained on or scored.

    sft          x | y EOS                              predicts y EOS
    correction   x | y_l | separator | y_w EOS          predicts y_w EOS
    identity     x | y_w | separator | y_w EOS          predicts y_w EOS
    scored       x | y                                  predicts y as it was sampled

Left out: truncation. A row that is too long is an error or is skipped; a cut response would teach
the model to stop in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from s2srm.config import DataConfig
from s2srm.data.schema import Demonstration, Preference, Prompt
from s2srm.data.templates import Template
from s2srm.errors import UserError
from s2srm.packing import Segment
from s2srm.watchdog import pulse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row", Preference, Demonstration, Prompt)
T = TypeVar("T")


@dataclass(frozen=True)
class TokenisedPreference:
    """Ids of x, y_w and y_l; the responses without EOS."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    where: str


@dataclass(frozen=True)
class TokenisedDemonstration:
    """Ids of a prompt and of the response to imitate, without EOS."""

    prompt: list[int]
    response: list[int]
    where: str


@dataclass(frozen=True)
class TokenisedPrompt:
    """Ids of a prompt up to where the response begins."""

    prompt: list[int]
    where: str


class _TooLong(ValueError):
    """A row over a limit; the message names the length and the limit."""


def sft_segment(
    template: Template, prompt_ids: Sequence[int], response_ids: Sequence[int]
) -> Segment:
    """x | y EOS, with y and EOS predicted. response_ids come without EOS."""
    tokens = [*prompt_ids, *response_ids, template.eos_id]
    return Segment(tokens, start=len(prompt_ids))


def rm_segments(
    template: Template,
    prompt_ids: Sequence[int],
    chosen_ids: Sequence[int],
    rejected_ids: Sequence[int],
    correction_weight: float = 1.0,
    identity_weight: float = 1.0,
) -> list[Segment]:
    """[correction, identity] of one triple, each with its weight; a weight may be 0.

    Source: arXiv 2409.00162, Figure 2. ValueError for a negative weight.
    """
    if min(correction_weight, identity_weight) < 0:
        raise ValueError(
            "correction_weight and identity_weight must not be negative, got "
            f"{correction_weight} and {identity_weight}"
        )
    segments: list[Segment] = []
    for source, weight in ((rejected_ids, correction_weight), (chosen_ids, identity_weight)):
        read = template.rm_input(prompt_ids, source)
        tokens = [*read, *chosen_ids, template.eos_id]
        segments.append(Segment(tokens, start=len(read), weight=weight))
    return segments


def scored_segment(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Segment:
    """x | y as sampled: response_ids end in EOS if, and only if, the response is finished."""
    return Segment([*prompt_ids, *response_ids], start=len(prompt_ids))


def tokenise_preferences(
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    cfg: DataConfig,
    model_max: int | None,
    layout: Literal["rm", "response"] = "rm",
) -> tuple[list[TokenisedPreference], int]:
    """Triples as ids, and the number of rows skipped for their length or their text.

    layout "rm": the longest sequence is x | y | separator | y EOS with the longer response on both
    sides, because rejected responses are scored too; "response" (scalar RM): x | y EOS. It must fit
    into model_max positions. UserError with place, length and limit for the first row that is too
    long, unless cfg.on_long_row is skip.
    """

    def convert(row: Preference) -> TokenisedPreference:
        responses = (row.chosen, row.rejected)
        prompt, (chosen, rejected) = template.encode(tokenizer, row.prompt, responses)
        _check_prompt(prompt, cfg)
        _check_response(chosen, "chosen", cfg)
        _check_response(rejected, "rejected", cfg)
        if chosen == rejected:
            # No token says which one is better: the RM would learn to copy, a scalar RM nothing.
            raise UserError("the chosen and rejected texts have the same tokens")
        longest = max(len(chosen), len(rejected))
        total = len(prompt) + longest + 1
        what = "prompt and response"
        if layout == "rm":
            total += longest + len(template.separator_ids)
            what = "prompt, response, separator and correction"
        _check_positions(total, model_max, what)
        return TokenisedPreference(prompt, chosen, rejected, row.where)

    return _tokenise(preferences, convert, cfg)


def tokenise_demonstrations(
    demonstrations: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    cfg: DataConfig,
    model_max: int | None,
) -> tuple[list[TokenisedDemonstration], int]:
    """Demonstrations as ids, and the number of rows skipped; see tokenise_preferences."""

    def convert(row: Demonstration) -> TokenisedDemonstration:
        prompt, (response,) = template.encode(tokenizer, row.prompt, (row.response,))
        _check_prompt(prompt, cfg)
        _check_response(response, "response", cfg)
        _check_positions(len(prompt) + len(response) + 1, model_max, "prompt and response")
        return TokenisedDemonstration(prompt, response, row.where)

    return _tokenise(demonstrations, convert, cfg)


def tokenise_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    cfg: DataConfig,
    model_max: int | None,
    reserve: int = 0,
) -> tuple[list[TokenisedPrompt], int]:
    """Prompts as ids, and the number of rows skipped; see tokenise_preferences.

    reserve is the number of positions that must stay free after the prompt, for the response and
    what the RM reads behind it.
    """

    def convert(row: Prompt) -> TokenisedPrompt:
        prompt = template.encode_prompt(tokenizer, row.prompt)
        _check_prompt(prompt, cfg)
        _check_positions(len(prompt) + reserve, model_max, f"prompt and {reserve} tokens after it")
        return TokenisedPrompt(prompt, row.where)

    return _tokenise(prompts, convert, cfg)


def _tokenise(
    rows: Sequence[Row], convert: Callable[[Row], T], cfg: DataConfig
) -> tuple[list[T], int]:
    tokenised: list[T] = []
    first: str | None = None
    for row in rows:
        pulse.beat()
        try:
            tokenised.append(convert(row))
        except (_TooLong, UserError) as error:
            long = isinstance(error, _TooLong)
            key, setting = (
                ("on_long_row", cfg.on_long_row) if long else ("on_bad_row", cfg.on_bad_row)
            )
            reason = f"{row.where}: {error}"
            if setting == "error":
                raise UserError(f"{reason} (data.{key}: skip leaves out such rows)") from None
            first = first or reason
    if not tokenised:
        raise UserError(f"all {len(rows)} rows of {cfg.path!r} were skipped; the first: {first}")
    return tokenised, len(rows) - len(tokenised)


def _check_prompt(ids: Sequence[int], cfg: DataConfig) -> None:
    if not ids:
        raise UserError("the prompt gives no tokens")
    if len(ids) > cfg.max_prompt_tokens:
        raise _TooLong(
            f"the prompt has {len(ids)} tokens, over data.max_prompt_tokens {cfg.max_prompt_tokens}"
        )


def _check_response(ids: Sequence[int], name: str, cfg: DataConfig) -> None:
    if not ids:
        raise UserError(f"the {name} text gives no tokens")
    if len(ids) + 1 > cfg.max_response_tokens:
        raise _TooLong(
            f"the {name} text has {len(ids) + 1} tokens with its end of sequence, over "
            f"data.max_response_tokens {cfg.max_response_tokens}"
        )


def _check_positions(length: int, model_max: int | None, what: str) -> None:
    if model_max is not None and length > model_max:
        raise _TooLong(f"{what} take {length} positions, over the model's {model_max}")
