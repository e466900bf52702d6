"""Seconds of a step, and its shares: operations over assumed rates, never a measurement.

A pass takes the longer of its arithmetic and its collectives, which overlap. Left out: waiting for
the slowest rank, data loading, evaluation and checkpoints, and everything that Python does between
operators except where it decides (decoding).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from s2srm.config import PPOConfig, RMConfig, ScalarRMConfig, SupervisedConfig
from s2srm.plan import flops
from s2srm.plan.devices import NODE_LINK, Efficiency
from s2srm.plan.estimate import Estimate
from s2srm.plan.models import Model, zero_stage
from s2srm.plan.workload import Load

RANKS_PER_NODE = 8
_HOST_BANDWIDTH = 100e9
_PCIE = 25e9
_OPTIMISER_BYTES = 28
"""AdamW reads and writes so many bytes a parameter: master and moments twice, gradient once."""


@dataclass(frozen=True)
class PhaseTime:
    """One phase of a step of one rank. bound: what its time is made of."""

    phase: str
    flops: float
    seconds: float
    bound: str


class Clock:
    """Times of one estimate's phases."""

    def __init__(self, estimate: Estimate, efficiency: Efficiency) -> None:
        self.estimate = estimate
        self.efficiency = efficiency
        self.device = estimate.place.device
        self.ranks = estimate.place.ranks

    def phases(self) -> list[PhaseTime]:
        """Of one optimiser step (PPO: of one phase with all its updates)."""
        cfg = self.estimate.cfg
        if isinstance(cfg, PPOConfig):
            return list(self._ppo(cfg))
        assert isinstance(cfg, SupervisedConfig)
        model, load = self.estimate.models["model"], self.estimate.loads()["train"]
        kind = isinstance(cfg, RMConfig)
        return [
            self._updates("train", model, load, 1, kind, not isinstance(cfg, ScalarRMConfig)),
            self._optimiser("optimiser", model, 1),
        ]

    def _ppo(self, cfg: PPOConfig) -> Iterator[PhaseTime]:
        models, loads = self.estimate.models, self.estimate.loads()
        phase = loads["phase"]
        yield self._rollout(cfg, models["policy"])
        reading = loads["read"]
        yield self._scores("reward", [(models["reward"], reading)])
        scored = [(models[name], phase) for name in ("policy", "reference", "critic")]
        yield self._scores("experience", scored)
        steps = cfg.ppo_epochs * math.ceil(cfg.rollout_size / cfg.minibatch_size)
        for name in ("policy", "critic"):
            model = models[name]
            yield self._updates(
                f"update {name}", model, loads["train"], steps, False, not model.value
            )
            yield self._optimiser(f"optimiser {name}", model, steps)

    def _rollout(self, cfg: PPOConfig, model: Model) -> PhaseTime:
        """Prompts at the rate of products; then every token of a batch takes the longer of reading
        weights and cache, the arithmetic, and launching each layer's operators."""
        counts, prompts = model.counts, self.estimate.lengths.prompts
        responses = math.ceil(cfg.rollout_size / self.ranks)
        prompt, new = sum(prompts) / len(prompts), cfg.sampling.max_new_tokens
        batch = self.estimate.generation_batch(cfg, model, max(prompts) + new)
        batches = math.ceil(responses / batch)
        reading = flops.trunk(counts, responses * prompt, prompt)
        writing = flops.decoding(counts, responses, prompt, new)
        weights = counts.total * model.itemsize
        kv = self.estimate.kv_per_token(model) * batch * (prompt + new / 2)
        rate = self._rate(model, self.efficiency.infer)
        step = max(
            (weights + kv) / (self.device.bandwidth * self.efficiency.decode),
            writing / (batches * new) / rate,
            0.0 if self.device.is_cpu else self.efficiency.launch_s * counts.layers,
        )
        seconds = reading / rate + batches * new * step + self._gather(model)
        return PhaseTime("rollout", reading + writing, seconds, f"{step * 1e3:.1f} ms a token")

    def _scores(self, phase: str, passes: list[tuple[Model, Load]]) -> PhaseTime:
        """Forwards over a phase's responses, one model after the other."""
        work, seconds = 0.0, 0.0
        for model, load in passes:
            counts = model.counts
            amount = flops.trunk(counts, load.step_tokens, load.length)
            amount += 0.0 if model.value else flops.head(counts, load.step_predicted)
            work += amount
            seconds += max(
                amount / self._rate(model, self.efficiency.infer),
                load.num_microbatches * self._gather(model),
            )
        return PhaseTime(phase, work, seconds, "")

    def _updates(
        self,
        phase: str,
        model: Model,
        load: Load,
        steps: int,
        recomputes_head: bool,
        has_head: bool,
    ) -> PhaseTime:
        counts = model.counts
        layers = flops.trunk(counts, load.step_tokens, load.length)
        head = flops.head(counts, load.step_predicted) if has_head else 0.0
        checkpointing = model.cfg.gradient_checkpointing
        work = steps * flops.training(layers, head, checkpointing, recomputes_head)
        arithmetic = work / self._rate(model, self.efficiency.train)
        passes = steps * load.num_microbatches
        collectives = passes * (2 * self._gather(model) + self._reduce(model))
        bound = "collectives" if collectives > arithmetic else "arithmetic"
        return PhaseTime(phase, work, max(arithmetic, collectives), bound)

    def _optimiser(self, phase: str, model: Model, steps: int) -> PhaseTime:
        """Memory traffic of AdamW over this rank's part; over PCIe and the host's where offloaded.

        The host of a node is shared by its ranks."""
        trained = model.counts.trained(model.value)
        cfg = self.estimate.cfg.engine
        is_partition = self.estimate.sharded and zero_stage(cfg, model.cfg.precision) > 0
        part = trained / self.ranks if is_partition else trained
        seconds = _OPTIMISER_BYTES * part / self.device.bandwidth
        if cfg.offload == "cpu" and self.estimate.sharded:
            here = min(self.ranks, RANKS_PER_NODE)
            seconds = _OPTIMISER_BYTES * part * here / _HOST_BANDWIDTH + 6 * part / _PCIE
        return PhaseTime(phase, 0.0, steps * seconds, "memory")

    def _rate(self, model: Model, share: float) -> float:
        peak = self.device.flops if model.itemsize == 2 else self.device.flops32
        return peak * share

    def _link(self) -> float:
        link = self.device.link if self.ranks <= RANKS_PER_NODE else NODE_LINK
        return link * self.efficiency.link

    def _gather(self, model: Model) -> float:
        """Seconds of one all-gather of a model under ZeRO-3."""
        cfg = self.estimate.cfg.engine
        if not self.estimate.sharded or zero_stage(cfg, model.cfg.precision) < 3:
            return 0.0
        return self._exchange(model)

    def _reduce(self, model: Model) -> float:
        """Seconds of one reduction of a model's gradients."""
        return self._exchange(model) if self.estimate.sharded else 0.0

    def _exchange(self, model: Model) -> float:
        share = (self.ranks - 1) / self.ranks
        return model.counts.held(model.value) * model.itemsize * share / self._link()
