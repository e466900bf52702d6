"""Supervised fine-tuning: maximum likelihood of a response and its EOS, given the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from s2srm.config import DataConfig, SFTConfig
from s2srm.data.examples import TokenisedDemonstration, sft_segment, tokenise_demonstrations
from s2srm.data.loading import load_demonstrations, log_rows
from s2srm.data.templates import Template
from s2srm.models.load import load_causal_lm
from s2srm.runs import RunResult
from s2srm.supervised.loop import Microbatch, Stats, Task, Unit, prepare, train
from s2srm.validation import validate
from s2srm.watchdog.watch import watching


def run(cfg: SFTConfig) -> RunResult:
    """Train; the output folder loads with AutoModelForCausalLM.from_pretrained."""
    cfg = validate(cfg)

    def load_rows(
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        longest: int | None,
    ) -> list[TokenisedDemonstration]:
        rows, report = load_demonstrations(data, cfg.response_column)
        tokenised, num_long = tokenise_demonstrations(rows, tokenizer, template, data, longest)
        log_rows(data, len(tokenised), report, num_long)
        return tokenised

    with watching(cfg.watchdog, cfg.output):
        data = prepare(cfg, load_rows)
        return train(cfg, SFTTask(cfg, data.template), data)


class SFTTask(Task[TokenisedDemonstration]):
    """loss = -(sum of log p(y_t | x, y_<t)) / number of tokens y_t, EOS included."""

    title = "SFT"

    def __init__(self, cfg: SFTConfig, template: Template) -> None:
        self.cfg = cfg
        self.template = template

    def model(self, zero_config: dict[str, Any] | None) -> nn.Module:
        return load_causal_lm(self.cfg.model, zero_config=zero_config, train=True)

    def units(self, row: TokenisedDemonstration) -> list[Unit]:
        return [Unit((sft_segment(self.template, row.prompt, row.response),))]

    def weight(self, units: Iterable[Unit]) -> float:
        return float(sum(s.num_predicted for unit in units for s in unit.segments))

    def loss(
        self, forward: Callable[..., Any], microbatch: Microbatch, weight: float
    ) -> tuple[Tensor, Stats]:
        return forward(microbatch.batch, "cross_entropy", reduction="sum") / weight, {}

    def score(self, forward: Callable[..., Any], microbatch: Microbatch) -> Stats:
        batch = microbatch.batch
        stats = forward(batch, "token_stats")
        return {
            "num_tokens": batch.targets.numel(),
            "nll": -stats.logprobs.double().sum(),
            "num_right": (stats.argmax == batch.targets).sum(),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        if "num_tokens" not in sums:
            return {}
        return {
            "loss": sums["nll"] / sums["num_tokens"],
            "token_accuracy": sums["num_right"] / sums["num_tokens"],
        }
