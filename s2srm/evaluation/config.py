"""Settings of `s2srm eval`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from s2srm.bounds import Bounds, NonNegativeFloat, NonNegativeInt, PositiveInt, check_bounds
from s2srm.config import (
    DataConfig,
    ModelConfig,
    Precision,
    SamplingConfig,
    TemplateConfig,
    TokenRewardConfig,
)
from s2srm.errors import UserError
from s2srm.validation import data, expand_paths, model, model_path, output_folder

WorldName = Literal["summarization", "safety", "instructions"]


@dataclass(frozen=True)
class EvalConfig:
    """Compare policies on the same prompts with the same sampling seeds."""

    output: str = ""
    """Folder for eval.json, responses.jsonl and feedback.jsonl; must not hold a run already."""
    overwrite: bool = False
    """Replace a run that is already in the output folder."""
    seed: NonNegativeInt = 0
    """Seed of a world's prompts and of sampling."""
    policies: dict[str, str] = field(default_factory=dict)
    """Name -> model folder, as in {sft: runs/sft, ppo: runs/ppo}, in the order of the table."""
    against: list[str] = field(default_factory=list)
    """Names of the policies that win rates are measured against; none given: the first policy."""
    world: WorldName | None = None
    """A miniature world: its gold judge scores responses to its test and ood prompts."""
    data: DataConfig | None = None
    """Prompts, where there is no world."""
    ood_data: DataConfig | None = None
    """Prompts of another family, where there is no world."""
    reward_model: ModelConfig | None = None
    """A seq2seq RM: its feedback on some responses is written for the report, and without a world
    its reward is the score. That score is the RM's own opinion, not a judgement of quality."""
    token: TokenRewardConfig = field(default_factory=TokenRewardConfig)
    """How that RM's statistics become token rewards."""
    precision: Precision = "float32"
    """Floating-point type of the policies."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Length limit and batch size; its temperature is not read."""
    temperatures: list[NonNegativeFloat] = field(default_factory=lambda: [0.0, 1.0])
    """Each is evaluated by itself; 0 is greedy."""
    num_samples: PositiveInt = 1
    """Responses per prompt at a temperature above 0; intervals stay over prompts."""
    num_prompts: Annotated[int, Bounds(2)] = 256
    """Prompts of each split."""
    num_resamples: Annotated[int, Bounds(100)] = 2000
    """Bootstrap resamples of the prompts behind each 95% confidence interval."""
    feedback_rows: NonNegativeInt = 12
    """Responses with token rewards and correction that are kept for the report."""
    template: TemplateConfig = field(default_factory=TemplateConfig)
    """For policies that no stage of s2srm saved; the others bring their own."""


def validate_eval(cfg: EvalConfig) -> EvalConfig:
    """Check every value, as `validation.validate` does; returns it with its paths expanded."""
    cfg = expand_paths(cfg)
    output_folder(cfg.output, "the folder for the results")
    check_bounds(cfg)
    if not cfg.policies:
        raise UserError("policies is missing: name -> model folder, as in --policies.sft runs/sft")
    for name, path in cfg.policies.items():
        model_path(f"policies.{name}", path)
    for name in cfg.against:
        if name not in cfg.policies:
            raise UserError(
                f"against: {name!r} is not among the policies ({', '.join(cfg.policies)})"
            )
    if (cfg.world is None) == (cfg.data is None):
        raise UserError("give either world or data: the prompts to evaluate on")
    for key, rows in (("data", cfg.data), ("ood_data", cfg.ood_data)):
        if rows is not None:
            data(key, rows)
    if cfg.world is not None and cfg.ood_data is not None:
        raise UserError("ood_data: a world has ood prompts of its own")
    if cfg.reward_model is not None:
        model("reward_model", cfg.reward_model)
    if not cfg.temperatures:
        raise UserError("temperatures is empty")
    return cfg
