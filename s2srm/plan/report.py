"""A plan as data, and as a page for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from s2srm.plan.devices import GIB, Device, Efficiency
from s2srm.plan.fit import Remedy
from s2srm.plan.phases import KINDS, Kind, Moment
from s2srm.plan.timing import PhaseTime


@dataclass(frozen=True)
class Plan:
    """Everything that was found. Bytes are of one rank.

    models      key -> where its architecture comes from, and its parameters
    peak        of the largest moment, with the allocator's reserve
    host        pinned or copied in the host's memory, beside the device's
    microbatch, generation  largest microbatch_tokens and sampling.batch_size that fit
    """

    stage: str
    device: Device
    ranks: int
    memory: float
    models: dict[str, tuple[str, int]]
    lengths: str
    moments: list[Moment]
    peak: float
    host: float
    times: list[PhaseTime]
    efficiency: Efficiency
    microbatch: int | None
    generation: int | None
    remedies: list[Remedy]

    @property
    def fits(self) -> bool:
        """Whether the peak is at most the memory."""
        return self.peak <= self.memory

    @property
    def seconds(self) -> float:
        """Of one optimiser step, PPO: of one phase."""
        return sum(time.seconds for time in self.times)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan for programs: bytes, seconds and operations, of one rank."""
    return {
        "stage": plan.stage,
        "device": asdict(plan.device),
        "efficiency": asdict(plan.efficiency),
        "ranks": plan.ranks,
        "memory_bytes": plan.memory,
        "models": {
            key: {"architecture": origin, "parameters": parameters}
            for key, (origin, parameters) in plan.models.items()
        },
        "lengths": plan.lengths,
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "host_bytes": plan.host,
        "phases": [
            {"phase": m.phase, "moment": m.what, "bytes": dict(m.bytes), "total_bytes": m.total}
            for m in plan.moments
        ],
        "times": [asdict(time) for time in plan.times],
        "step_seconds": plan.seconds,
        "largest_microbatch_tokens": plan.microbatch,
        "largest_generation_batch": plan.generation,
        "remedies": [asdict(remedy) for remedy in plan.remedies],
    }


def as_text(plan: Plan) -> Iterator[str]:
    """Lines for people."""
    yield f"{plan.stage} on {plan.ranks} x {plan.device.name}, {_gib(plan.memory)} GiB each"
    for key, (origin, parameters) in plan.models.items():
        yield f"  {key}: {parameters:,} parameters ({origin})"
    yield f"  lengths: {plan.lengths}"
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _verdict(plan)
    yield ""
    yield from _time(plan)


def _memory(plan: Plan) -> Iterator[str]:
    moments = plan.moments
    yield "GiB of one rank at the largest moment of each phase"
    kinds: list[Kind] = [kind for kind in KINDS if any(m.bytes.get(kind, 0) >= 1 for m in moments)]
    width = max(10, *(len(m.phase) + 2 for m in moments))
    yield f"{'':<22}" + "".join(f"{m.phase:>{width}}" for m in moments)
    for kind in kinds:
        cells = (_gib(m.bytes.get(kind, 0.0)) for m in moments)
        yield f"{kind:<22}" + "".join(f"{cell:>{width}}" for cell in cells)
    yield f"{'in all':<22}" + "".join(f"{_gib(m.total):>{width}}" for m in moments)
    if plan.host:
        yield f"host memory of a rank beside it: {_gib(plan.host)} GiB"


def _verdict(plan: Plan) -> Iterator[str]:
    worst = max(plan.moments, key=lambda m: m.total)
    where = f"{worst.phase} ({worst.what})"
    gap = plan.memory - plan.peak
    if plan.fits:
        yield f"fits: at most {_gib(plan.peak)} GiB in {where}, {_gib(gap)} GiB left"
    else:
        yield f"does not fit: {_gib(plan.peak)} GiB in {where}, {_gib(-gap)} GiB too much"
    if plan.microbatch is not None:
        yield f"largest microbatch_tokens that fits: {plan.microbatch}"
    if plan.generation is not None:
        yield f"largest sampling.batch_size whose rollout fits: {plan.generation}"
    for remedy in plan.remedies:
        verdict = "fits" if remedy.fits else "does not fit yet"
        yield (
            f"  {remedy.setting}: {_gib(remedy.peak)} GiB, {_gib(plan.peak - remedy.peak)} GiB "
            f"less: {verdict}"
        )


def _time(plan: Plan) -> Iterator[str]:
    share = plan.efficiency
    unit = "phase" if plan.stage == "ppo" else "step"
    yield f"one {unit}: {plan.seconds:.3g} s, assuming these rates (not measured):"
    yield (
        f"  {share.train:.0%} of peak products in training, {share.infer:.0%} in scoring, "
        f"{share.decode:.0%} of memory bandwidth in decoding, {share.link:.0%} of the link; peaks "
        f"{plan.device.flops / 1e12:.3g} TFLOP/s bf16, {plan.device.flops32 / 1e12:.3g} float32, "
        f"{plan.device.bandwidth / 1e12:.3g} TB/s"
    )
    for time in plan.times:
        part = time.seconds / plan.seconds if plan.seconds else 0.0
        yield (
            f"  {time.phase:<18}{time.seconds:>10.3g} s {part:>6.1%} "
            f"{time.flops / 1e12:>10.3g} TFLOP  {time.bound}"
        )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
