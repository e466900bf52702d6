"""Which rank runs which sequence, so that no rank waits long for another.

Under ZeRO-3 the ranks run every forward together, so a step takes as long as its largest forward of
any rank. Everything here is a function of the sequences' lengths, which all ranks know, so that all
come to the same plan without asking each other.

Cost model: a sequence costs its tokens. Left out: the quadratic part of causal attention, which is
layers x width x length / parameters of the rest (1.5% for Gemma-2B at 1024 tokens).

What can be reached: the fullest of R ranks has at least the mean, the longest sequence, and, where
there are more sequences than ranks, the R-th and the next longest together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from s2srm.packing import split_by_budget

EVEN_ENOUGH = 1.01
"""Fullest rank over the mean at which nothing more is moved."""


def deal(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Number of every sequence, by rank, in ascending order: about as many tokens for each.

    Longest first, each to the rank that has least; then the fullest rank gives a sequence away, or
    exchanges one, for as long as that helps.
    """
    loads = [0] * num_ranks
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for i in _longest_first(lengths):
        rank = min(range(num_ranks), key=loads.__getitem__)
        shares[rank].append(i)
        loads[rank] += lengths[i]
    return _evened_out(lengths, shares, may_give=True)


def deal_equal_counts(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """`deal` for generation, whose time follows the number of sequences first: their numbers
    differ by 1 at most."""
    loads = [0] * num_ranks
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    order = _longest_first(lengths)
    for first in range(0, len(order), num_ranks):
        emptiest = sorted(range(num_ranks), key=loads.__getitem__)
        for i, rank in zip(order[first : first + num_ranks], emptiest, strict=False):
            shares[rank].append(i)
            loads[rank] += lengths[i]
    return _evened_out(lengths, shares, may_give=False)


def deal_forwards(lengths: Sequence[int], num_ranks: int, budget: int) -> list[list[list[int]]]:
    """[rank][forward]: numbers of the sequences that a rank packs into one forward.

    Ranks have about as many tokens, and the same number of forwards but for those that have fewer
    sequences than that. A rank's forwards are about as full, the fullest first, so that the ranks
    are in step. No forward has more than `budget` tokens, or it has a single sequence.
    """
    shares = deal(lengths, num_ranks)
    fitted = [split_by_budget([lengths[i] for i in share], budget) for share in shares]
    count = max(map(len, fitted))
    plan: list[list[list[int]]] = []
    for share, few in zip(shares, fitted, strict=True):
        own = [lengths[i] for i in share]
        even = deal(own, min(count, len(own))) if own else []
        fits = all(len(group) == 1 or sum(own[i] for i in group) <= budget for group in even)
        groups = even if fits else few
        groups.sort(key=lambda group: (-sum(own[i] for i in group), group))
        plan.append([[share[i] for i in group] for group in groups])
    return plan


def max_over_mean(loads: Sequence[int]) -> float:
    """Tokens of the fullest rank over the mean; 1 where there are none."""
    return max(loads) * len(loads) / sum(loads) if any(loads) else 1.0


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _evened_out(
    lengths: Sequence[int], shares: list[list[int]], *, may_give: bool
) -> list[list[int]]:
    """The fullest share gives or exchanges until it is full enough, or nothing helps."""
    loads = [sum(lengths[i] for i in share) for share in shares]
    enough = max(max(lengths, default=0), EVEN_ENOUGH * sum(loads) / len(loads))
    while max(loads) > enough:
        fullest = max(range(len(loads)), key=loads.__getitem__)
        for other in sorted(range(len(loads)), key=loads.__getitem__):
            gap = loads[fullest] - loads[other]
            found = _exchange(lengths, shares[fullest], shares[other], gap, may_give=may_give)
            if found is not None:
                break
        else:
            break
        given, taken = found
        shares[fullest].remove(given)
        shares[other].append(given)
        if taken is not None:
            shares[other].remove(taken)
            shares[fullest].append(taken)
        moved = lengths[given] - (0 if taken is None else lengths[taken])
        loads[fullest] -= moved
        loads[other] += moved
    return [sorted(share) for share in shares]


def _exchange(
    lengths: Sequence[int], full: list[int], other: list[int], gap: int, *, may_give: bool
) -> tuple[int, int | None] | None:
    """(given, taken) that brings two shares closest together, taken None for nothing; None where
    no exchange leaves the fuller of the two below what it has now."""
    back: list[tuple[int, int | None]] = sorted((lengths[j], j) for j in other)
    if may_give:
        back.insert(0, (0, None))
    best: tuple[float, int, int | None] | None = None
    for i in full:
        # Half the gap is best; what lies on either side of it is looked at.
        place = bisect_left(back, lengths[i] - gap / 2, key=lambda pair: pair[0])
        for length, j in back[max(0, place - 1) : place + 1]:
            moved = lengths[i] - length
            off = abs(moved - gap / 2)
            if 0 < moved < gap and (best is None or off < best[0]):
                best = off, i, j
    return None if best is None else best[1:]
