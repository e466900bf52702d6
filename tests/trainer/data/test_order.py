"""Every row once an epoch, the same on every rank, another order each time."""

from __future__ import annotations

import itertools

import pytest

from s2srm.data.order import global_batches, num_steps


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (10, 3), (12, 4), (5, 8), (100, 7)])
def test_an_epoch_visits_every_row_once(rows: int, batch: int) -> None:
    batches = list(global_batches(rows, batch, seed=3))
    assert sorted(itertools.chain(*batches)) == list(range(rows))
    assert [len(b) for b in batches[:-1]] == [batch] * (len(batches) - 1)
    assert len(batches[-1]) == (rows - 1) % batch + 1


def test_epochs_differ_and_seeds_differ_and_nothing_else() -> None:
    two = list(global_batches(50, 50, seed=0, epochs=2))
    assert two[0] != two[1]
    assert two == list(global_batches(50, 50, seed=0, max_steps=2))
    assert next(global_batches(50, 50, seed=1)) not in two
    assert next(global_batches(50, 10, seed=0)) == two[0][:10]


def test_negative_seed() -> None:
    assert list(global_batches(9, 9, seed=-1)) != list(global_batches(9, 9, seed=1))


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "steps"),
    [(10, 4, 1.0, 3), (10, 4, 0.5, 2), (10, 4, 2.0, 6), (10, 1, 1.1, 11), (10, 4, 0.01, 1)],
)
def test_number_of_steps(rows: int, batch: int, epochs: float, steps: int) -> None:
    assert num_steps(rows, batch, epochs) == steps
    assert len(list(global_batches(rows, batch, 0, epochs=epochs))) == steps


def test_max_steps_decides_alone() -> None:
    batches = list(global_batches(3, 2, seed=0, epochs=1, max_steps=5))
    assert [len(b) for b in batches] == [2, 1, 2, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "num_rows must be positive, got 0"),
        ((1, 0), "batch_size must be positive, got 0"),
        ((1, 1, 0.0), "epochs must be positive"),
        ((1, 1, 1.0, 0), "max_steps must be at least 1, got 0"),
        ((1, 1, float("nan")), "epochs must be positive, got nan"),
    ],
)
def test_bad_counts(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        num_steps(*arguments)
    rows, batch, *rest = arguments
    with pytest.raises(ValueError, match=message):
        global_batches(rows, batch, 0, *rest)
