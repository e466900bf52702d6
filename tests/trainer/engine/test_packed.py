"""Whatever the micro-batches, results come back in the order of the segments."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from s2srm import distributed
from s2srm.config import EngineConfig
from s2srm.engine import Engine, PackedSegments, build_engine
from s2srm.engine.base import dummy_batch
from s2srm.models.causal import PackedCausalLM
from s2srm.packing import Packed, Segment


class Recorder:
    """Stands in for an engine: remembers the batches of its forwards."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.calls: list[Packed] = []

    def __call__(self, batch: Packed) -> Packed:
        self.calls.append(batch)
        return batch


def targets_and_lasts(engine: Recorder):
    """What tells every predicted token, and every sequence, from all others."""

    def fn(batch: Packed) -> tuple[Tensor, Tensor, Tensor]:
        batch = engine(batch)
        pairs = torch.stack([batch.targets, batch.positions[batch.rows]], dim=1)
        return batch.targets, pairs, batch.tokens[batch.last].double()

    return fn


def some_segments(seed: int) -> list[Segment]:
    rng = random.Random(seed)
    lengths = [rng.randint(2, 9) for _ in range(rng.randint(1, 12))]
    # No token occurs twice.
    ids = iter(rng.sample(range(1000), sum(lengths)))
    return [Segment([next(ids) for _ in range(n)], rng.randint(1, n - 1)) for n in lengths]


def check(packed: PackedSegments, segments: list[Segment]) -> None:
    engine = Recorder()
    targets, pairs, lasts = packed.map(engine, targets_and_lasts(engine))
    assert targets.tolist() == [t for s in segments for t in s.tokens[s.start :]]
    expected = [(s.tokens[i], i - 1) for s in segments for i in range(s.start, len(s.tokens))]
    assert pairs.tolist() == [list(pair) for pair in expected]
    assert lasts.tolist() == [s.tokens[-1] for s in segments]
    assert (targets.dtype, lasts.dtype) == (torch.int64, torch.float64)
    assert len(engine.calls) == len(packed.batches)


@pytest.mark.parametrize("seed", range(20))
def test_within_a_budget(seed: int) -> None:
    segments = some_segments(seed)
    budget = random.Random(seed).choice([1, 5, 12, 1000])
    packed = PackedSegments.within(segments, budget, "cpu")
    assert all(b.tokens.numel() <= max(budget, 9) for b in packed.batches)
    check(packed, segments)


@pytest.mark.parametrize("seed", range(5))
def test_in_groups_that_someone_else_chose(seed: int) -> None:
    segments = some_segments(seed)
    numbers = list(range(len(segments)))
    random.Random(seed).shuffle(numbers)
    groups = [numbers[i : i + 3] for i in range(0, len(numbers), 3)]
    check(PackedSegments(segments, groups, "cpu"), segments)


def test_one_predicted_token_in_every_sequence() -> None:
    """Rows and sequences are as many then, and in the same order."""
    segments = [Segment([i, 50 + i], 1) for i in range(7)]
    check(PackedSegments(segments, [[6, 2], [0, 5, 1], [4, 3]], "cpu"), segments)


@pytest.mark.parametrize("num_segments", [0, 1, 4])
def test_as_many_forwards_as_the_busiest_rank(
    num_segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "max_over_ranks", lambda value: max(value, 6))
    segments = [Segment([i, 50 + i, 90 + i], 1) for i in range(num_segments)]
    engine = Recorder()
    packed = PackedSegments.within(segments, 3, "cpu")
    targets, pairs, lasts = packed.map(engine, targets_and_lasts(engine))
    assert [len(engine.calls), len(packed.batches)] == [6, num_segments]
    dummy = dummy_batch().tokens.tolist()
    assert [b.tokens.tolist() for b in engine.calls[num_segments:]] == [dummy] * (6 - num_segments)
    assert (targets.shape, pairs.shape) == ((2 * num_segments,), (2 * num_segments, 2))
    assert (lasts.shape, lasts.dtype) == ((num_segments,), torch.float64)


def test_a_real_engine_gives_what_one_at_a_time_gives() -> None:
    engine: Engine = build_engine(
        lambda zero: PackedCausalLM(tiny_model("gemma3-tied")), EngineConfig(), None
    )
    segments = [Segment([3 + i, 9, 30 - i, *range(3, 4 + 2 * i)], 2) for i in range(5)]

    def fn(batch: Packed) -> tuple[Tensor]:
        return (engine(batch, "logprobs").logprobs,)

    (together,) = PackedSegments.within(segments, 20, engine.device).map(engine, fn)
    (alone,) = PackedSegments(segments, [[4], [2], [0], [3], [1]], engine.device).map(engine, fn)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert together.numel() == sum(s.num_predicted for s in segments)


@pytest.mark.parametrize("groups", [[[0]], [[0, 1], [1]], [[0, 1, 2]]])
def test_every_segment_is_in_one_group(groups: list[list[int]]) -> None:
    segments = [Segment([5, 6, 7], 1), Segment([8, 9], 1)]
    with pytest.raises((AssertionError, IndexError)):
        PackedSegments(segments, groups, "cpu")
