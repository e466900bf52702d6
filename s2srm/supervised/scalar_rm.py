"""The scalar reward model: Bradley-Terry on the score of a response's last token (its EOS).

L = mean over pairs of  -log sigmoid(r(x, y_w) - r(x, y_l)) + centre_coef (r_w + r_l)^2
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from s2srm.config import ScalarRMConfig
from s2srm.correlation import correlation, joint_moments
from s2srm.data.examples import TokenisedPreference, scored_segment
from s2srm.data.templates import Template
from s2srm.models.load import load_value_model
from s2srm.runs import RunResult
from s2srm.supervised.loop import Microbatch, Stats, Task, Unit, prepare, train
from s2srm.supervised.rm import load_triples
from s2srm.validation import validate
from s2srm.watchdog.watch import watching

MOMENTS = ("n", "x", "y", "xx", "yy", "xy")


def run(cfg: ScalarRMConfig) -> RunResult:
    """Train; the folder also loads as a causal LM, the head is in score_head.safetensors."""
    cfg = validate(cfg)
    with watching(cfg.watchdog, cfg.output):
        data = prepare(cfg, partial(load_triples, layout="response"))
        return train(cfg, ScalarRMTask(cfg, data.template), data)


class ScalarRMTask(Task[TokenisedPreference]):
    """One unit per pair: chosen and rejected stay in one micro-batch."""

    title = "scalar RM"

    def __init__(self, cfg: ScalarRMConfig, template: Template) -> None:
        self.cfg = cfg
        self.template = template

    def model(self, zero_config: dict[str, Any] | None) -> nn.Module:
        return load_value_model(
            self.cfg.model, zero_config=zero_config, train=True, init="normal", seed=self.cfg.seed
        )

    def units(self, row: TokenisedPreference) -> list[Unit]:
        eos = [self.template.eos_id]
        chosen = scored_segment(row.prompt, [*row.chosen, *eos])
        rejected = scored_segment(row.prompt, [*row.rejected, *eos])
        return [Unit((chosen, rejected))]

    def weight(self, units: Iterable[Unit]) -> float:
        return float(sum(1 for _ in units))

    def loss(
        self, forward: Callable[..., Any], microbatch: Microbatch, weight: float
    ) -> tuple[Tensor, Stats]:
        chosen, rejected = forward(microbatch.batch)[microbatch.batch.last].view(-1, 2).unbind(1)
        loss = self._pair_losses(chosen, rejected).sum() / weight
        return loss, _right(chosen, rejected)

    def score(self, forward: Callable[..., Any], microbatch: Microbatch) -> Stats:
        batch = microbatch.batch
        scores = forward(batch)[batch.last]
        chosen, rejected = scores.view(-1, 2).unbind(1)
        lengths = batch.cu_rows.diff()
        return {
            "pair_loss": self._pair_losses(chosen, rejected).double().sum(),
            **_right(chosen, rejected),
            **dict(zip(MOMENTS, joint_moments(scores, lengths).unbind(), strict=True)),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        found = {"accuracy": sums["num_right"] / sums["num_pairs"]}
        if "pair_loss" in sums:
            found["loss"] = sums["pair_loss"] / sums["num_pairs"]
            found["reward_length_correlation"] = correlation([sums[name] for name in MOMENTS])
        return found

    def _pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        losses = -F.logsigmoid(chosen - rejected)
        if self.cfg.centre_coef > 0:
            losses = losses + self.cfg.centre_coef * (chosen + rejected).square()
        return losses


def _right(chosen: Tensor, rejected: Tensor) -> Stats:
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    return {"num_right": right.sum(), "num_pairs": float(chosen.numel())}
