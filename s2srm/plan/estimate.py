"""A stage's moments in bytes: its models, their engines, passes and loads put together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from s2srm.config import (
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RMConfig,
    ScalarRMConfig,
    SFTConfig,
    StageConfig,
    SupervisedConfig,
)
from s2srm.models.export import MAX_SHARD_BYTES
from s2srm.plan.lengths import Lengths, rows_per_example
from s2srm.plan.models import (
    ITEMSIZE,
    Model,
    Place,
    architecture,
    is_deepspeed,
    passes_of,
    zero_stage,
)
from s2srm.plan.passes import Pass, Passes
from s2srm.plan.phases import Awake, Bytes, Head, Moment, add, at_rest, forward, training_moments
from s2srm.plan.states import Trainee, ZeroSizes, torch_engine, zero_engine
from s2srm.plan.workload import Load, cut, fill, pack_steps
from s2srm.plan.workspaces import head_training, sampling

_PROBE_BATCH = 32
"""supervised/rm_probe.py generates for so many corrections at a time."""


class Estimate:
    """One stage's plan of memory in one place."""

    def __init__(
        self, cfg: StageConfig, place: Place, lengths: Lengths, full: bool = False
    ) -> None:
        """full: micro-batches and generation batches are full, however few rows a step has."""
        self.full = full
        self.cfg = cfg
        self.place = place
        self.lengths = lengths
        self.sharded = is_deepspeed(cfg.engine, place.ranks)
        self.models = dict(self._models())

    def moments(self) -> list[Moment]:
        """Every moment of the stage, in the order in which they come."""
        cfg = self.cfg
        found = self._ppo(cfg) if isinstance(cfg, PPOConfig) else self._supervised(cfg)
        return list(found)

    # Models and loads.

    def _models(self) -> Iterator[tuple[str, Model]]:
        cfg = self.cfg
        if isinstance(cfg, SupervisedConfig):
            yield (
                "model",
                self._model(cfg.model, "model.path", isinstance(cfg, ScalarRMConfig), cfg.optim),
            )
            return
        assert isinstance(cfg, PPOConfig)
        reference = replace(cfg.policy, path=cfg.reference or cfg.policy.path)
        critic = replace(cfg.policy, path=cfg.critic.path or cfg.policy.path)
        yield "policy", self._model(cfg.policy, "policy.path", False, cfg.optim)
        yield "reference", self._model(reference, "reference", False, None)
        yield "critic", self._model(critic, "critic.path", True, cfg.critic.optim)
        is_scalar = cfg.reward.kind == "scalar"
        yield "reward", self._model(cfg.reward.model, "reward.model.path", is_scalar, None)

    def _model(self, cfg: ModelConfig, key: str, value: bool, optim: OptimConfig | None) -> Model:
        source, counts = architecture(cfg.path, cfg.trust_remote_code, key)
        trainee = Trainee(
            held=counts.held(value),
            trained=counts.trained(value) if optim is not None else 0,
            largest=counts.largest,
            layer=counts.layer,
            small=counts.small,
            itemsize=ITEMSIZE[cfg.precision],
            optimizer=None if optim is None else optim.name,
        )
        if self.sharded:
            holding = zero_engine(
                trainee,
                zero_stage(self.cfg.engine, cfg.precision),
                self.place.ranks,
                self.cfg.engine.offload == "cpu",
                ZeroSizes(),
            )
        else:
            holding = torch_engine(trainee)
        return Model(cfg, source, counts, value, holding)

    def loads(self) -> dict[str, Load]:
        """What a rank packs: `train` of a step, `read` of what the reward model reads of a phase,
        `phase` of a phase's responses."""
        cfg, ranks = self.cfg, self.place.ranks
        assert isinstance(cfg, SupervisedConfig | PPOConfig)
        rows, budget = self.lengths.rows, cfg.microbatch_tokens
        if self.full:
            load = fill(rows, budget)
            reading = fill(self.lengths.reading or rows, budget)
            return {"train": load, "phase": load, "read": reading}
        if isinstance(cfg, PPOConfig):
            minibatch = math.ceil(cfg.minibatch_size / ranks)
            phase = math.ceil(cfg.rollout_size / ranks)
            return {
                "train": pack_steps(cut(rows, minibatch), budget),
                "phase": pack_steps(cut(rows, phase, most=2), budget),
                "read": pack_steps(cut(self.lengths.reading, phase, most=2), budget),
            }
        per_step = math.ceil(cfg.batch_size / ranks) * rows_per_example(cfg)
        return {"train": pack_steps(cut(rows, per_step), budget)}

    # Passes.

    def _passes(self, model: Model) -> Passes:
        cfg = model.cfg
        flash = (
            not self.place.device.is_cpu and cfg.precision == "bfloat16" and cfg.attention != "sdpa"
        )
        return passes_of(model.source.config, cfg.precision, flash)

    def packed(self, model: Model, kind: Pass, load: Load, train: bool) -> float:
        """Activations of a pass over the load's largest micro-batch."""
        checkpointing = train and model.cfg.gradient_checkpointing
        plane = self._passes(model).packed(
            kind, train, checkpointing, load.length, load.predicted_each
        )
        return plane.line(model.counts.layers).at(load.sequences)

    def _update(self, name: str, model: Model, kind: Pass, load: Load, rest: Bytes) -> Any:
        counts = model.counts
        head = Head(embedding=float(counts.head * model.itemsize))
        if not model.value:
            workspace = head_training(
                load.predicted,
                counts.vocabulary,
                counts.hidden,
                model.itemsize,
                not self.place.device.is_cpu,
            )
            gradient = 4.0 * counts.head
            head = replace(
                head, workspace=workspace, gradient=gradient, is_tied=counts.untied_head == 0
            )
        activations = self.packed(model, kind, load, train=True)
        return training_moments(name, model.holding, rest, activations, head, load.num_microbatches)

    def _scoring(self, phase: str, model: Model, kind: Pass, load: Load, rest: Bytes) -> Moment:
        activations = self.packed(model, kind, load, train=False)
        return Moment(phase, kind, add(rest, forward(model.holding, activations)))

    def _own_scoring(self, policy: Model, load: Load, rest: Bytes) -> Moment:
        """Old logprobs. TorchEngine keeps the graph of the first forward for the first update."""
        scoring = self._scoring("experience", policy, "logprobs", load, rest)
        if self.sharded:
            return scoring
        kept: Bytes = {"activations": self.packed(policy, "ppo", load, train=True)}
        return replace(scoring, what="first forward kept", bytes=add(scoring.bytes, kept))

    def generation(
        self, phase: str, model: Model, batch: int, width: int, new: int, rest: Bytes
    ) -> Iterator[Moment]:
        """A prompt pass of `width` tokens and the last of `new` steps, for `batch` sequences."""
        layers, passes = model.counts.layers, self._passes(model)
        kv = self.kv_per_token(model) * batch
        common = add(
            rest,
            {
                "gathered policy": model.holding.whole,
                "head workspace": sampling(batch, model.counts.vocabulary),
            },
        )
        ends = {
            "prompts read": (width, passes.prefill(width)),
            "last token": (width + new, passes.decode(width + new)),
        }
        for what, (tokens, plane) in ends.items():
            peak = plane.line(layers).at(batch)
            cache_bytes = min(kv * tokens, peak)
            cost: Bytes = {"KV cache": cache_bytes, "activations": peak - cache_bytes}
            yield Moment(phase, what, add(common, cost))

    @property
    def host(self) -> float:
        """Bytes of the host's memory beside the device's: offloaded, and what may sleep there."""
        held = [model.holding for model in self.models.values()]
        asleep = sum(h.weights + h.master + h.optimiser for h in held) if self.sleeps else 0.0
        return asleep + sum(h.host for h in held)

    # Stages.

    def _supervised(self, cfg: StageConfig) -> Iterator[Moment]:
        assert isinstance(cfg, SupervisedConfig)
        model, load = self.models["model"], self.loads()["train"]
        rest = add(self.place.overhead, at_rest(model.holding))
        yield self._loaded(["model"])
        if isinstance(cfg, ScalarRMConfig):
            train_kind, eval_kind = "value", "value"
        else:
            train_kind = "cross_entropy_sum" if isinstance(cfg, SFTConfig) else "cross_entropy_none"
            eval_kind = "token_stats"
        yield from self._update("train", model, train_kind, load, rest)
        if cfg.eval_data is not None:
            yield self._scoring("evaluate", model, eval_kind, load, rest)
            if isinstance(cfg, RMConfig) and cfg.probe_rows > 0:
                new = cfg.data.max_response_tokens
                width = load.longest - new + 1
                batch = min(_PROBE_BATCH, math.ceil(cfg.probe_rows / self.place.ranks))
                yield from self.generation("evaluate", model, batch, width, new, rest)
        yield self._saved(model, rest)

    def _ppo(self, cfg: PPOConfig) -> Iterator[Moment]:
        """Where engine.offload is idle, what each phase wakes is that of ppo/train.py."""
        models, loads = self.models, self.loads()
        policy, reference, critic, reward = (
            models[name] for name in ("policy", "reference", "critic", "reward")
        )
        yield self._loaded(list(models))
        width, new = max(self.lengths.prompts), cfg.sampling.max_new_tokens
        rest = self._resting(policy="weights")
        batch = self.generation_batch(cfg, policy, width + new)
        yield from self.generation("rollout", policy, batch, width, new, rest)
        rest = self._resting(reward="weights")
        if reward.value:
            yield self._scoring("reward", reward, "value", loads["read"], rest)
        elif cfg.reward.token.mode == "aligned":
            read = loads["read"].longest - new
            batch = self.generation_batch(cfg, reward, read + new)
            yield from self.generation("reward", reward, batch, read, new, rest)
        else:
            yield self._scoring("reward", reward, "token_stats", loads["read"], rest)
        # One after the other; none sleeps before the phase is over.
        rest = self._resting(critic="weights")
        yield self._scoring("experience", critic, "value", loads["train"], rest)
        rest = self._resting(critic="weights", reference="weights")
        yield self._scoring("experience", reference, "logprobs", loads["train"], rest)
        rest = self._resting(critic="weights", reference="weights", policy="weights")
        yield self._own_scoring(policy, loads["train"], rest)
        rest = self._resting(policy="all")
        yield from self._update("update policy", policy, "ppo", loads["train"], rest)
        rest = self._resting(critic="all")
        yield from self._update("update critic", critic, "value", loads["train"], rest)
        yield self._saved(policy, self._resting(critic="all", policy="weights"))

    @property
    def sleeps(self) -> bool:
        """Whether idle models and optimisers wait in host memory."""
        return self.cfg.engine.offload == "idle" and not self.place.device.is_cpu

    def _resting(self, **awake: Awake) -> Bytes:
        """The process and its models between two passes; awake: of those that do not sleep."""
        return add(
            self.place.overhead,
            *(
                at_rest(model.holding, awake.get(name, "nothing") if self.sleeps else "all")
                for name, model in self.models.items()
            ),
        )

    def generation_batch(self, cfg: PPOConfig, model: Model, tokens: int) -> int:
        """Responses written at a time, the longest of so many tokens with its prompt."""
        sampling = cfg.sampling
        batch = sampling.batch_size
        if not self.full:
            batch = min(batch, math.ceil(cfg.rollout_size / self.place.ranks))
        if sampling.kv_cache_gib > 0:
            budget = sampling.kv_cache_gib * 2**30
            batch = min(batch, int(budget / (self.kv_per_token(model) * tokens)))
        return max(1, batch)

    def kv_per_token(self, model: Model) -> float:
        """Bytes of keys and values of one token in all layers."""
        return 2.0 * model.counts.layers * model.counts.kv_width * model.itemsize

    def _loaded(self, names: list[str]) -> Moment:
        """All models built, before the first step makes moments; where they sleep, the largest."""
        held = [at_rest(replace(self.models[name].holding, optimiser=0)) for name in names]
        if self.sleeps:
            held = [max(held, key=lambda kinds: sum(kinds.values()))]
        return Moment("load", "models built", add(self.place.overhead, *held))

    def _saved(self, model: Model, rest: Bytes) -> Moment:
        """Rank 0 copies a shard to the host before it writes it; of a GPU that is other memory."""
        extra: Bytes = {}
        if self.place.device.is_cpu:
            whole = model.counts.held(model.value) * model.itemsize
            extra = {"gathered policy": min(whole, MAX_SHARD_BYTES)}
        return Moment("save", "a shard copied", add(rest, extra))
