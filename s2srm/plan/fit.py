"""What fits: the largest micro-batch and generation batch, and which setting makes a plan fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from s2srm.config import PPOConfig, StageConfig
from s2srm.plan.estimate import Estimate
from s2srm.plan.lengths import Lengths
from s2srm.plan.models import Place
from s2srm.plan.phases import Moment, by_phase, largest

MOST_TOKENS = 2**20
MOST_SEQUENCES = 2**14


@dataclass(frozen=True)
class Remedy:
    """A change of settings, and the peak that it gives."""

    setting: str
    peak: float
    fits: bool


class Fitting:
    """Peaks of a stage under other settings, in one place with so much memory."""

    def __init__(self, cfg: StageConfig, place: Place, lengths: Lengths, memory: float) -> None:
        self.cfg = cfg
        self.place = place
        self.lengths = lengths
        self.memory = memory

    def moments(self, cfg: StageConfig | None = None, place: Place | None = None) -> list[Moment]:
        """The largest moment of each phase."""
        estimate = Estimate(cfg or self.cfg, place or self.place, self.lengths)
        return by_phase(estimate.moments())

    def peak(self, cfg: StageConfig | None = None, place: Place | None = None) -> float:
        """Bytes of the largest moment, with what the allocator loses."""
        return with_reserve(largest(self.moments(cfg, place)), place or self.place)

    def fits(self, cfg: StageConfig | None = None) -> bool:
        """Whether the peak is at most the memory."""
        return self.peak(cfg) <= self.memory

    def largest_microbatch(self) -> int | None:
        """Most microbatch_tokens that fit, of the powers of two times 1 and 1.5; None: none."""
        cfg: Any = self.cfg
        return self._most(lambda n: replace(cfg, microbatch_tokens=n), 256, MOST_TOKENS)

    def largest_generation(self) -> int | None:
        """Most sampling.batch_size whose rollout fits, in such sizes; None where nothing is sampled
        or not even one prompt fits."""
        cfg = self.cfg
        if not isinstance(cfg, PPOConfig):
            return None
        return self._most(
            lambda n: replace(cfg, sampling=replace(cfg.sampling, batch_size=n, kv_cache_gib=0.0)),
            1,
            MOST_SEQUENCES,
            only=("rollout",),
        )

    def remedies(self) -> list[Remedy]:
        """Changes that lower the peak, the mildest first."""
        found: list[Remedy] = []
        now = self.peak()
        for setting, cfg, place in self._changes():
            peak = self.peak(cfg, place)
            if peak < 0.98 * now:
                found.append(Remedy(setting, peak, peak <= self.memory))
        return found

    def _changes(self) -> Iterator[tuple[str, StageConfig, Place]]:
        cfg: Any = self.cfg
        on_cpu = self.place.device.is_cpu
        key = "policy" if isinstance(cfg, PPOConfig) else "model"
        model = getattr(cfg, key)
        if not model.gradient_checkpointing:
            changed = replace(model, gradient_checkpointing=True)
            yield f"{key}.gradient_checkpointing true", replace(cfg, **{key: changed}), self.place
        for part in (2, 4, 8):
            tokens = cfg.microbatch_tokens // part
            if tokens >= 256:
                yield (
                    f"microbatch_tokens {tokens}",
                    replace(cfg, microbatch_tokens=tokens),
                    self.place,
                )
        if isinstance(cfg, PPOConfig):
            yield from self._generation_changes(cfg)
        if cfg.engine.zero_stage < 3 and self.place.ranks > 1:
            engine = replace(cfg.engine, zero_stage=3)
            yield "engine.zero_stage 3", replace(cfg, engine=engine), self.place
        if isinstance(cfg, PPOConfig) and cfg.engine.offload == "none" and not on_cpu:
            engine = replace(cfg.engine, offload="idle")
            yield "engine.offload idle", replace(cfg, engine=engine), self.place
        if cfg.engine.offload != "cpu" and not on_cpu:
            engine = replace(cfg.engine, offload="cpu", zero_stage=3, kind="auto")
            yield "engine.offload cpu", replace(cfg, engine=engine), self.place
        if model.precision == "float32" and not on_cpu:
            yield "precision bfloat16 of every model", _in_bfloat16(cfg), self.place
        for ranks in (2 * self.place.ranks, 4 * self.place.ranks):
            yield f"{ranks} ranks", cfg, replace(self.place, ranks=ranks)

    def _generation_changes(self, cfg: PPOConfig) -> Iterator[tuple[str, StageConfig, Place]]:
        for part in (2, 4, 8):
            size = cfg.sampling.batch_size // part
            if size >= 1:
                sampling = replace(cfg.sampling, batch_size=size)
                yield f"sampling.batch_size {size}", replace(cfg, sampling=sampling), self.place

    def _most(
        self,
        change: Callable[[int], StageConfig],
        low: int,
        high: int,
        only: tuple[str, ...] = (),
    ) -> int | None:
        """The largest of low, 1.5 low, 2 low, ... up to high whose plan fits."""
        best = None
        for size in _sizes(low, high):
            estimate = Estimate(change(size), self.place, self.lengths, full=True)
            moments = [m for m in estimate.moments() if not only or m.phase in only]
            if with_reserve(largest(moments), self.place) > self.memory:
                break
            best = size
        return best


def _sizes(low: int, high: int) -> Iterator[int]:
    """low, 1.5 low, 2 low, 3 low, ... up to high; low is a power of two."""
    while low <= high:
        yield low
        if low > 1:
            yield low * 3 // 2
        low *= 2


def with_reserve(moment: Moment, place: Place) -> float:
    """A moment's bytes with the caching allocator's share of what it allocates."""
    own = moment.bytes.get("libraries", 0.0)
    return own + (moment.total - own) * (1 + place.device.reserve)


def _in_bfloat16(cfg: Any) -> Any:
    if isinstance(cfg, PPOConfig):
        reward = replace(cfg.reward, model=replace(cfg.reward.model, precision="bfloat16"))
        policy = replace(cfg.policy, precision="bfloat16")
        return replace(cfg, policy=policy, reward=reward)
    return replace(cfg, model=replace(cfg.model, precision="bfloat16"))
