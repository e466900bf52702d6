"""What a rank computes in a step: its micro-batches, by the same packing as the run.

Lengths are those of the data where it can be read here (a local file, a local tokenizer), else the
settings' limits, so that a plan without data is one for the longest rows. Responses of a rollout
are as long as they may become.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from s2srm.packing import split_by_budget


@dataclass(frozen=True)
class Row:
    """Sequences that stay in one micro-batch: their lengths, and how many tokens are predicted."""

    lengths: tuple[int, ...]
    predicted: int

    @property
    def tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Load:
    """A rank's forwards of one optimiser step (or one scoring of a phase).

    tokens, predicted             of its largest micro-batch
    num_microbatches              most in a step
    step_tokens, step_predicted   mean of a step, over the rank's micro-batches
    length, predicted_each        tokens of a sequence and how many are predicted, on average
    longest                       tokens of the longest sequence
    """

    tokens: int
    predicted: int
    num_microbatches: int
    step_tokens: float
    step_predicted: float
    length: int
    predicted_each: int
    longest: int

    @property
    def sequences(self) -> float:
        """Of the largest micro-batch, all of the average length."""
        return self.tokens / self.length


def pack_steps(steps: Sequence[Sequence[Row]], budget: int) -> Load:
    """The load of steps, each given by a rank's rows."""
    bins: list[list[Row]] = []
    counts: list[int] = []
    for rows in steps:
        groups = split_by_budget([row.tokens for row in rows], budget)
        bins.extend([rows[i] for i in group] for group in groups)
        counts.append(len(groups))
    return _load(bins, max(counts), len(steps))


def fill(rows: Sequence[Row], budget: int) -> Load:
    """The load of a step whose micro-batches are full, as with very many rows."""
    chosen: list[Row] = []
    room = budget
    for row in itertools.cycle(rows):
        room -= row.tokens
        if chosen and room < 0:
            break
        chosen.append(row)
    return _load([chosen, chosen], 2, 1)


def _load(bins: Sequence[Sequence[Row]], num_microbatches: int, num_steps: int) -> Load:
    largest = max(bins, key=lambda rows: sum(row.tokens for row in rows))
    everything = list(itertools.chain.from_iterable(bins))
    tokens = sum(row.tokens for row in everything)
    predicted = sum(row.predicted for row in everything)
    sequences = sum(len(row.lengths) for row in everything)
    return Load(
        tokens=sum(row.tokens for row in largest),
        predicted=sum(row.predicted for row in largest),
        num_microbatches=num_microbatches,
        step_tokens=tokens / num_steps,
        step_predicted=predicted / num_steps,
        length=max(2, round(tokens / sequences)),
        predicted_each=max(1, round(predicted / sequences)),
        longest=max(max(row.lengths) for row in everything),
    )


def cut(rows: Sequence[Row], per_step: int, most: int = 16) -> list[list[Row]]:
    """`most` steps of per_step rows each; rows are asked again where there are too few."""
    endless = itertools.cycle(rows)
    count = max(1, min(most, len(rows) // per_step))
    return [list(itertools.islice(endless, per_step)) for _ in range(count)]
