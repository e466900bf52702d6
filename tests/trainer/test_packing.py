"""Packed batches: every index checked against the segments they come from."""

from __future__ import annotations

import random

import pytest
import torch

from s2srm.packing import Segment, pack, rows_of, split_by_budget, split_rows


def random_segments(seed: int) -> list[Segment]:
    rng = random.Random(seed)
    segments = []
    for _ in range(rng.randint(1, 9)):
        length = rng.choice([2, 2, 3, rng.randint(2, 40)])
        tokens = [rng.randrange(50) for _ in range(length)]
        segments.append(Segment(tokens, rng.randint(1, length - 1), rng.random()))
    return segments


@pytest.mark.parametrize("seed", range(20))
def test_every_row_predicts_the_next_token_of_its_own_sequence(seed: int) -> None:
    segments = random_segments(seed)
    batch = pack(segments)
    assert batch.num_sequences == len(segments)
    assert [t.dtype for t in (batch.tokens, batch.positions, batch.rows, batch.targets)] == (
        [torch.int64] * 4
    )
    assert (batch.cu_seqlens.dtype, batch.cu_rows.dtype) == (torch.int32, torch.int32)
    assert batch.weights.dtype == torch.float32
    for b, segment in enumerate(segments):
        begin, end = batch.cu_seqlens[b : b + 2].tolist()
        first, last = batch.cu_rows[b : b + 2].tolist()
        assert batch.tokens[begin:end].tolist() == list(segment.tokens)
        assert batch.positions[begin:end].tolist() == list(range(len(segment.tokens)))
        assert batch.targets[first:last].tolist() == list(segment.tokens[segment.start :])
        rows = batch.rows[first:last].tolist()
        assert rows == list(range(begin + segment.start - 1, end - 1))
        assert batch.weights[first:last].tolist() == pytest.approx(
            [segment.weight] * segment.num_predicted
        )
        assert int(batch.last[b]) == end - 1
    assert int(batch.cu_seqlens[-1]) == batch.tokens.numel()
    assert int(batch.cu_rows[-1]) == batch.rows.numel() == batch.weights.numel()


@pytest.mark.parametrize("seed", range(5))
def test_the_last_token_of_a_sequence_predicts_nothing(seed: int) -> None:
    batch = pack(random_segments(seed))
    assert not set(batch.rows.tolist()) & set(batch.last.tolist())


def test_smallest_segment_and_token_containers() -> None:
    batch = pack([Segment((7, 8), 1), Segment(torch.tensor([5, 6]).tolist(), 1, weight=0.0)])
    assert (batch.rows.tolist(), batch.targets.tolist()) == ([0, 2], [8, 6])
    assert batch.weights.tolist() == [1.0, 0.0]


def test_token_ids_beyond_int32_are_kept() -> None:
    assert pack([Segment([0, 2**40], 1)]).targets.tolist() == [2**40]


def test_moving_a_batch_moves_every_tensor() -> None:
    batch = pack([Segment([1, 2, 3], 1)])
    moved = batch.to("meta")
    assert all(tensor.device.type == "meta" for tensor in vars(moved).values())
    assert batch.tokens.device.type == "cpu"


@pytest.mark.parametrize(("length", "start"), [(3, 0), (3, 3), (3, 4), (3, -1), (1, 1), (0, 0)])
def test_segment_without_prefix_or_prediction(length: int, start: int) -> None:
    with pytest.raises(ValueError, match=f"got {start}"):
        Segment(list(range(length)), start)


def test_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="segments is empty"):
        pack([])


@pytest.mark.parametrize("seed", range(20))
def test_bins_hold_everything_once_and_keep_the_budget(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(0, 60) for _ in range(rng.randint(1, 50))]
    budget = rng.choice([1, 10, 50, 100])
    bins = split_by_budget(lengths, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    for b in bins:
        assert b == sorted(b)
        assert sum(lengths[i] for i in b) <= budget or len(b) == 1
    assert bins == sorted(bins)
    assert bins == split_by_budget(lengths, budget)
    # First-fit never leaves two bins that would have fitted into one.
    sums = sorted(sum(lengths[i] for i in b) for b in bins)
    assert len(sums) < 2 or sums[0] + sums[1] > budget


def test_bins_by_hand() -> None:
    assert split_by_budget([3, 9, 4, 1, 12], 8) == [[0, 2, 3], [1], [4]]
    assert split_by_budget([], 8) == []
    with pytest.raises(ValueError, match="budget must be at least 1 token, got 0"):
        split_by_budget([1], 0)


def test_rows_of_some_sequences_in_the_order_asked_for() -> None:
    cu_rows = torch.tensor([0, 2, 5, 6], dtype=torch.int32)
    assert rows_of(cu_rows, [2, 0]).tolist() == [5, 0, 1]
    assert rows_of(cu_rows, []).shape == (0,)


def test_rows_come_apart_again() -> None:
    batch = pack(random_segments(3))
    parts = split_rows(batch.targets, batch.cu_rows)
    assert [p.tolist() for p in parts] == [list(s.tokens[s.start :]) for s in random_segments(3)]
    assert torch.equal(torch.cat(parts), batch.targets)
    table = torch.arange(10.0).reshape(5, 2)
    empty_between = split_rows(table, torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    assert [part.shape for part in empty_between] == [(2, 2), (0, 2), (3, 2)]
