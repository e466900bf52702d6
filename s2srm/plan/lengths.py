"""The lengths of a stage's rows in tokens: the data's, where it is here, else the limits.

Left out: hub data sets (no network), and chat templates' own tokens where only limits are known.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from s2srm.config import (
    DataConfig,
    ModelConfig,
    PPOConfig,
    RMConfig,
    ScalarRMConfig,
    SFTConfig,
    StageConfig,
    SupervisedConfig,
)
from s2srm.data.examples import (
    rm_segments,
    scored_segment,
    sft_segment,
    tokenise_demonstrations,
    tokenise_preferences,
    tokenise_prompts,
)
from s2srm.data.loading import load_demonstrations, load_preferences, load_prompts
from s2srm.data.templates import Template
from s2srm.models.load import load_tokenizer
from s2srm.packing import Segment
from s2srm.plan.workload import Row

_READ_ROWS = 2048


class Lengths(NamedTuple):
    """Rows of a stage (of PPO: prompts and the longest responses), and where they come from.

    reading  PPO with a seq2seq reward: the rows that the reward model reads
    """

    rows: list[Row]
    origin: str
    reading: list[Row]
    prompts: list[int]


def find_lengths(cfg: StageConfig) -> Lengths:
    """See the module."""
    data, model = _data(cfg), _model(cfg)
    if Path(data.path).exists() and (Path(model.path) / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(model)
        template = Template.build(tokenizer, cfg.template)
        return _of_data(cfg, replace(data, limit=data.limit or _READ_ROWS), tokenizer, template)
    return of_limits(cfg, data.max_prompt_tokens, data.max_response_tokens)


def of_limits(cfg: StageConfig, prompt: int, response: int) -> Lengths:
    """Every prompt and every response as long as this."""
    origin = f"every prompt {prompt} and every response {response} tokens"
    if isinstance(cfg, PPOConfig):
        response = cfg.sampling.max_new_tokens
        origin = f"every prompt {prompt} and every response {response} tokens"
        return _ppo(cfg, [prompt], 0, origin)
    if isinstance(cfg, RMConfig):
        rows = [Row((prompt + 2 * response,), response)] * _num_mappings(cfg)
    elif isinstance(cfg, ScalarRMConfig):
        rows = [Row((prompt + response, prompt + response), 2 * response)]
    else:
        rows = [Row((prompt + response,), response)]
    return Lengths(rows, origin, [], [])


def rows_per_example(cfg: StageConfig) -> int:
    """Rows that one example of the data becomes."""
    return _num_mappings(cfg) if isinstance(cfg, RMConfig) else 1


def _num_mappings(cfg: RMConfig) -> int:
    return sum(weight > 0 for weight in (cfg.correction_weight, cfg.identity_weight))


def _of_data(
    cfg: StageConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase, template: Template
) -> Lengths:
    origin = f"the first rows of {data.path}"
    if isinstance(cfg, PPOConfig):
        prompts, _ = load_prompts(data)
        ids, _ = tokenise_prompts(prompts, tokenizer, template, data, None)
        origin += f", every response {cfg.sampling.max_new_tokens} tokens"
        return _ppo(cfg, [len(row.prompt) for row in ids], len(template.separator_ids), origin)
    if isinstance(cfg, SFTConfig):
        texts, _ = load_demonstrations(data, cfg.response_column)
        found, _ = tokenise_demonstrations(texts, tokenizer, template, data, None)
        return Lengths(
            [_row(sft_segment(template, r.prompt, r.response)) for r in found], origin, [], []
        )
    pairs, _ = load_preferences(data)
    layout = "response" if isinstance(cfg, ScalarRMConfig) else "rm"
    triples, _ = tokenise_preferences(pairs, tokenizer, template, data, None, layout)
    rows: list[Row] = []
    for triple in triples:
        if isinstance(cfg, RMConfig):
            weights = (cfg.correction_weight, cfg.identity_weight)
            segments = rm_segments(
                template, triple.prompt, triple.chosen, triple.rejected, *weights
            )
            rows.extend(_row(segment) for segment in segments if segment.weight > 0)
        else:
            both = (triple.chosen, triple.rejected)
            scored = [scored_segment(triple.prompt, [*ids, template.eos_id]) for ids in both]
            rows.append(_row(*scored))
    return Lengths(rows, origin, [], [])


def _ppo(cfg: PPOConfig, prompts: list[int], separator: int, origin: str) -> Lengths:
    new = cfg.sampling.max_new_tokens
    read = new + separator if cfg.reward.kind == "seq2seq" else 0
    rows = [Row((prompt + new,), new) for prompt in prompts]
    reading = [Row((prompt + new + read,), new) for prompt in prompts]
    return Lengths(rows, origin, reading, prompts)


def _row(*segments: Segment) -> Row:
    return Row(
        tuple(len(segment.tokens) for segment in segments),
        sum(segment.num_predicted for segment in segments),
    )


def _data(cfg: StageConfig) -> DataConfig:
    assert isinstance(cfg, SupervisedConfig | PPOConfig)
    return cfg.data


def _model(cfg: StageConfig) -> ModelConfig:
    assert isinstance(cfg, SupervisedConfig | PPOConfig)
    return cfg.policy if isinstance(cfg, PPOConfig) else cfg.model
