"""Adapters to everyone's implementation of the vocabulary operations, ours first."""

from __future__ import annotations

from benchmarks.providers.base import Provider
from benchmarks.providers.cce import CutCrossEntropy, CutCrossEntropyExact
from benchmarks.providers.eager import Compiled, Eager, TorchChunked
from benchmarks.providers.liger import (
    LigerGRPO,
    LigerScaled,
    LigerSM90,
    LigerTriton,
    LigerTritonFloat32,
)
from benchmarks.providers.ours import Ours
from benchmarks.providers.quack import Quack
from benchmarks.providers.sequences import SEQUENCE_PROVIDERS
from benchmarks.providers.verl import Verl

PROVIDERS: tuple[Provider, ...] = (
    Ours("triton"),
    Ours("triton", workspace_bytes=0),
    Ours("cpp"),
    Ours("cpp", workspace_bytes=0),
    Ours("reference"),
    Eager(),
    Compiled(),
    TorchChunked(),
    LigerTriton(),
    LigerTritonFloat32(),
    LigerSM90(),
    LigerScaled(),
    LigerGRPO(),
    CutCrossEntropy(),
    CutCrossEntropyExact(),
    Quack(),
    Verl(),
)


def providers_named(names: list[str] | None) -> list[Provider]:
    """All of them for None, in the order of PROVIDERS.

    ValueError for a name that is neither there nor in SEQUENCE_PROVIDERS.
    """
    known = {provider.name: provider for provider in PROVIDERS}
    allowed = [*known, *(p.name for p in SEQUENCE_PROVIDERS if p.name not in known)]
    unknown = [name for name in names or [] if name not in allowed]
    if unknown:
        raise ValueError(f"provider {unknown[0]!r} is not one of {', '.join(allowed)}")
    return [p for p in PROVIDERS if names is None or p.name in names]
