"""Sequences dealt to ranks: everything once, as even as their lengths allow, forwards in step."""

from __future__ import annotations

import math
import random
from itertools import chain, zip_longest

import pytest

from s2srm.balance import deal, deal_equal_counts, deal_forwards, max_over_mean

# Tokens of prompt | response at every twentieth of 3604 chosen responses of Anthropic HH (helpful
# and harmless), a token taken to be 4.5 characters.
HH = [
    9,
    27,
    38,
    47,
    57,
    68,
    79,
    92,
    103,
    115,
    128,
    141,
    156,
    173,
    192,
    215,
    239,
    277,
    325,
    413,
    901,
]


def log_uniform(draw: random.Random, low: int = 8, high: int = 512) -> int:
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


LENGTHS = {
    "log-uniform": lambda draw: log_uniform(draw, 8, 256) + log_uniform(draw, 8, 256),
    # As responses are that often reach the recipes' limit.
    "truncated": lambda draw: log_uniform(draw) + min(512, log_uniform(draw, 32, 2000)),
    "hh": lambda draw: round(draw.uniform(HH[k := draw.randrange(20)], HH[k + 1])),
}


def loads(lengths: list[int], shares: list[list[int]]) -> list[int]:
    return [sum(lengths[i] for i in share) for share in shares]


def best(lengths: list[int], num_ranks: int) -> float:
    """What the fullest rank has at least: see the module's docstring."""
    longest = sorted(lengths, reverse=True)
    together = sum(longest[num_ranks - 1 : num_ranks + 1]) if len(lengths) > num_ranks else 0
    return max(sum(lengths) / num_ranks, longest[0], together)


@pytest.mark.parametrize("num_ranks", [2, 8, 32])
@pytest.mark.parametrize("kind", LENGTHS)
def test_a_minibatch_of_the_recipes_is_within_5_percent_of_even(kind, num_ranks):
    for seed in range(20):
        draw = random.Random(seed)
        lengths = [LENGTHS[kind](draw) for _ in range(128)]
        shares = deal(lengths, num_ranks)
        assert sorted(chain(*shares)) == list(range(128))
        assert all(share == sorted(share) for share in shares)
        assert max(loads(lengths, shares)) <= 1.05 * best(lengths, num_ranks)
        assert shares == deal(lengths, num_ranks), "every rank comes to the same"


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "expected"),
    [
        ([], 2, [0, 0]),
        ([5], 3, [0, 0, 5]),
        ([3, 3, 3], 2, [3, 6]),
        ([9, 1, 1, 1], 2, [3, 9]),
        ([4] * 7, 2, [12, 16]),
        ([4] * 7, 1, [28]),
    ],
)
def test_few_sequences(lengths, num_ranks, expected):
    shares = deal(lengths, num_ranks)
    assert sorted(chain(*shares)) == list(range(len(lengths)))
    assert sorted(loads(lengths, shares)) == expected
    assert deal_forwards(lengths, num_ranks, 100) == [[s] if s else [] for s in shares]


def test_an_exchange_mends_what_longest_first_gets_wrong():
    # Longest first: 5 + 3 + 3 against 5 + 4.
    assert loads([5, 5, 4, 3, 3], deal([5, 5, 4, 3, 3], 2)) == [10, 10]


def test_equal_counts():
    draw = random.Random(0)
    for count in (1, 7, 64, 67):
        lengths = [log_uniform(draw) for _ in range(count)]
        for num_ranks in (1, 2, 8):
            shares = deal_equal_counts(lengths, num_ranks)
            assert sorted(chain(*shares)) == list(range(count))
            sizes = [len(share) for share in shares]
            assert max(sizes) - min(sizes) <= 1
            if count >= 64 and count % num_ranks == 0:
                assert max_over_mean(loads(lengths, shares)) <= 1.02


@pytest.mark.parametrize("budget", [600, 1024, 8192])
@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_forwards_are_within_the_budget_and_in_step(num_ranks, budget):
    for seed in range(10):
        draw = random.Random(seed)
        lengths = [LENGTHS["log-uniform"](draw) for _ in range(128)]
        plan = deal_forwards(lengths, num_ranks, budget)
        assert sorted(i for rank in plan for group in rank for i in group) == list(range(128))
        assert [sorted(chain(*rank)) for rank in plan] == deal(lengths, num_ranks)
        filled = [[sum(lengths[i] for i in group) for group in rank] for rank in plan]
        assert max(chain(*filled)) <= budget
        assert all(fill == sorted(fill, reverse=True) for fill in filled)
        # What the ranks spend, each forward being as long as its longest, over what they must.
        steps = sum(map(max, zip_longest(*filled, fillvalue=0)))
        assert steps * num_ranks <= (1.15 if budget == 600 else 1.05) * sum(lengths)


def test_a_sequence_over_the_budget_has_a_forward_of_its_own():
    plan = deal_forwards([50, 10, 10, 10], 2, 20)
    assert plan == [[[0]], [[1, 3], [2]]]


def test_where_an_even_split_breaks_the_budget_first_fit_stands():
    # Nothing but 6 + 4 and 5 + 5 fits twice in 10.
    (rank,) = deal_forwards([6, 5, 5, 4], 1, 10)
    assert sorted(map(tuple, rank)) == [(0, 3), (1, 2)]


def test_max_over_mean():
    assert max_over_mean([3, 1]) == 1.5
    assert max_over_mean([0, 0]) == 1.0
