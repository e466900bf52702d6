"""The seq2seq reward model: sequence maximum likelihood of corrections and identities.

Correction mapping (x, y_l) -> y_w and identity mapping (x, y_w) -> y_w (Zhou et al., "Sequence to
Sequence Reward Modeling", arXiv 2409.00162, Figure 2). The formula is inferred from the paper's
description; weights and reductions are this project's own:

    token_mean:    L = sum_s w_s sum_t nll_st / sum_s w_s |y_s|
    sequence_sum:  L = sum_s w_s sum_t nll_st / sum_s w_s

over the sequences s of the global batch, w_s the weight of its mapping, nll over the output tokens
and EOS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from s2srm.config import DataConfig, RMConfig
from s2srm.data.examples import TokenisedPreference, rm_segments, tokenise_preferences
from s2srm.data.loading import load_preferences, log_rows
from s2srm.data.templates import Template
from s2srm.engine import Engine
from s2srm.models.load import load_causal_lm
from s2srm.packing import split_rows
from s2srm.runs import RunResult
from s2srm.supervised.loop import Microbatch, Stats, Task, Unit, prepare, train
from s2srm.supervised.rm_probe import probe_rm
from s2srm.validation import validate
from s2srm.watchdog.watch import watching

CORRECTION, IDENTITY = 0, 1
NAMES = {CORRECTION: "correction", IDENTITY: "identity"}


def run(cfg: RMConfig) -> RunResult:
    """Train; the output folder loads with AutoModelForCausalLM.from_pretrained."""
    cfg = validate(cfg)
    with watching(cfg.watchdog, cfg.output):
        data = prepare(cfg, load_triples)
        return train(cfg, RMTask(cfg, data.template), data)


def load_triples(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    longest: int | None,
    layout: Literal["rm", "response"] = "rm",
) -> list[TokenisedPreference]:
    """Preference triples as token ids, with what was skipped in the log."""
    rows, report = load_preferences(cfg)
    tokenised, num_long = tokenise_preferences(rows, tokenizer, template, cfg, longest, layout)
    log_rows(cfg, len(tokenised), report, num_long)
    return tokenised


class RMTask(Task[TokenisedPreference]):
    """Correction and identity segments with their weights."""

    title = "seq2seq RM"

    def __init__(self, cfg: RMConfig, template: Template) -> None:
        self.cfg = cfg
        self.template = template

    def model(self, zero_config: dict[str, Any] | None) -> nn.Module:
        return load_causal_lm(self.cfg.model, zero_config=zero_config, train=True)

    def units(self, row: TokenisedPreference) -> list[Unit]:
        """What is trained: no computation is spent on a mapping of weight 0."""
        weights = (self.cfg.correction_weight, self.cfg.identity_weight)
        return [unit for unit in self._both(row, *weights) if unit.segments[0].weight > 0]

    def dev_units(self, row: TokenisedPreference) -> list[Unit]:
        """Both mappings, also where one of them is not trained."""
        return self._both(row, 1.0, 1.0)

    def _both(self, row: TokenisedPreference, correction: float, identity: float) -> list[Unit]:
        segments = rm_segments(
            self.template, row.prompt, row.chosen, row.rejected, correction, identity
        )
        kinds = (CORRECTION, IDENTITY)
        return [Unit((s,), kind) for s, kind in zip(segments, kinds, strict=True)]

    def weight(self, units: Iterable[Unit]) -> float:
        segments = (segment for unit in units for segment in unit.segments)
        if self.cfg.reduction == "sequence_sum":
            return sum(s.weight for s in segments)
        return sum(s.weight * s.num_predicted for s in segments)

    def loss(
        self, forward: Callable[..., Any], microbatch: Microbatch, weight: float
    ) -> tuple[Tensor, Stats]:
        batch = microbatch.batch
        nll = forward(batch, "cross_entropy", reduction="none")
        return (nll * batch.weights).sum() / weight, by_mapping("nll", nll.detach(), microbatch)

    def score(self, forward: Callable[..., Any], microbatch: Microbatch) -> Stats:
        batch = microbatch.batch
        stats = forward(batch, "token_stats")
        right = stats.argmax == batch.targets
        first_rows = batch.cu_rows[:-1].long()
        is_correction = microbatch.row_kinds[first_rows] == CORRECTION
        exact = torch.stack([part.all() for part in split_rows(right, batch.cu_rows)])
        return {
            **by_mapping("nll", -stats.logprobs, microbatch),
            **by_mapping("num_right", right, microbatch),
            "num_exact": (exact & is_correction).sum(),
            "num_corrections": is_correction.sum(),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Per mapping: mean nll per token, token accuracy; loss weighs them as the training does.

        correction_accuracy: corrections whose teacher-forced argmax is right at every token.
        """
        found: dict[str, float] = {}
        weights = {"correction": self.cfg.correction_weight, "identity": self.cfg.identity_weight}
        counts = {n: c for n in weights if (c := sums.get(f"num_tokens/{n}", 0.0)) > 0}
        for name, count in counts.items():
            found[f"{name}_loss"] = sums[f"nll/{name}"] / count
        whole = sum(weights[n] * c for n, c in counts.items())
        found["loss"] = sum(weights[n] * sums[f"nll/{n}"] for n in counts) / whole
        if "num_exact" in sums:
            for name, count in counts.items():
                found[f"{name}_token_accuracy"] = sums[f"num_right/{name}"] / count
            num_right = sum(sums[f"num_right/{n}"] for n in counts)
            found["token_accuracy"] = num_right / sum(counts.values())
            found["correction_accuracy"] = sums["num_exact"] / sums["num_corrections"]
        return found

    def probe(self, engine: Engine, rows: Sequence[TokenisedPreference]) -> dict[str, float]:
        return probe_rm(engine, self.template, rows, self.cfg)


def by_mapping(stat: str, values: Tensor, microbatch: Microbatch) -> Stats:
    """Sums of (N,) values over the rows of each mapping, and how many rows it has."""
    sums: dict[str, Tensor] = {}
    for kind, name in NAMES.items():
        mask = microbatch.row_kinds == kind
        sums[f"{stat}/{name}"] = values[mask].double().sum()
        sums[f"num_tokens/{name}"] = mask.sum()
    return sums
