"""A stage's models in their place: architecture, counts, the engine's holding, traces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from transformers import PretrainedConfig

from s2srm.config import EngineConfig, ModelConfig
from s2srm.plan.counts import Counts, count
from s2srm.plan.devices import Device
from s2srm.plan.passes import Passes
from s2srm.plan.phases import Bytes
from s2srm.plan.sources import Source, find_architecture
from s2srm.plan.states import Holding

ITEMSIZE = {"float32": 4, "float64": 8, "bfloat16": 2}


@dataclass(frozen=True)
class Place:
    """Where it is to run: so many ranks, each with a device; library_bytes on a CPU."""

    device: Device
    ranks: int
    library_bytes: float = 0.0

    @property
    def overhead(self) -> Bytes:
        """What a process takes before any tensor."""
        if self.device.is_cpu:
            return {"libraries": self.library_bytes}
        return {"libraries": self.device.context + self.device.ranks * (self.ranks > 1)}


@dataclass(frozen=True)
class Model:
    """One of a stage's models: its settings, architecture, engine's holding."""

    cfg: ModelConfig
    source: Source
    counts: Counts
    value: bool
    holding: Holding

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return ITEMSIZE[self.cfg.precision]


@cache
def architecture(path: str, trust_remote_code: bool, key: str) -> tuple[Source, Counts]:
    """Found and counted once."""
    cfg = ModelConfig(path=path, trust_remote_code=trust_remote_code)
    source = find_architecture(cfg, key)
    return source, count(source.config)


_passes: dict[tuple[str, str, bool], Passes] = {}


def passes_of(config: PretrainedConfig, precision: str, flash: bool) -> Passes:
    """Traces of an architecture, kept: a search for what fits asks for them again and again."""
    key = (config.to_json_string(), precision, flash)
    if key not in _passes:
        _passes[key] = Passes(config, precision, flash)
    return _passes[key]


def is_deepspeed(cfg: EngineConfig, ranks: int) -> bool:
    """engine.build's choice, for a number of ranks that is not this process's."""
    if cfg.kind == "auto":
        return ranks > 1 or cfg.offload == "cpu"
    return cfg.kind == "deepspeed"


def zero_stage(cfg: EngineConfig, precision: str) -> int:
    """DeepSpeedEngine takes ZeRO-1 for 0 in bfloat16."""
    return 1 if cfg.zero_stage == 0 and precision == "bfloat16" else cfg.zero_stage
