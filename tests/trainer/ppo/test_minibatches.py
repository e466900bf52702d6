"""Prompts, shuffles and minibatches that do not depend on the number of ranks."""

from collections import Counter

import pytest

from s2srm.ppo.minibatches import (
    Minibatch,
    Rollouts,
    balance_metrics,
    permutation,
    plan_epoch,
    prompt_schedule,
    responses_by_rank,
)
from s2srm.rollout.base import Response


def rollouts(lengths):
    return Rollouts(
        prompts=[[5, 6]] * len(lengths),
        responses=[Response([7] * n, False) for n in lengths],
    )


def test_every_prompt_comes_once_before_any_comes_again():
    chosen = [p for phase in range(9) for p in prompt_schedule(12, 4, seed=0, phase=phase)]
    passes = [chosen[:12], chosen[12:24], chosen[24:]]
    assert all(sorted(p) == list(range(12)) for p in passes)
    assert len({tuple(p) for p in passes}) == 3, "each pass in another order"


def test_fewer_prompts_than_responses_in_a_phase():
    counts = Counter(prompt_schedule(3, 10, seed=0, phase=2))
    assert sorted(counts.values()) == [3, 3, 4]


def test_a_phase_does_not_need_the_phases_before_it():
    assert prompt_schedule(7, 5, 3, 4) == prompt_schedule(7, 5, 3, 4)
    assert prompt_schedule(7, 5, 3, 4) != prompt_schedule(7, 5, 4, 4)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_minibatches_cover_every_response_once_and_count_their_tokens(num_ranks):
    lengths = [1, 9, 3, 3, 5, 2, 8]
    order = permutation(7, 0, 0, 0)
    plan = plan_epoch(rollouts(lengths), order, 3, 12, num_ranks)
    assert sorted(i for share in responses_by_rank(plan) for i in share) == list(range(7))
    for number, minibatch in enumerate(plan):
        groups = [group for rank in minibatch.by_rank for group in rank]
        members = sorted(i for group in groups for i in group)
        assert members == sorted(order[3 * number : 3 * number + 3])
        assert minibatch.num_tokens == sum(lengths[i] for i in members)
        assert minibatch.tokens == [
            [sum(lengths[i] + 2 for i in group) for group in rank] for rank in minibatch.by_rank
        ]
        for group in groups:
            assert len(group) == 1 or sum(lengths[i] + 2 for i in group) <= 12


def test_a_rank_without_a_response_in_a_minibatch_has_no_microbatch(monkeypatch):
    plan = plan_epoch(rollouts([4, 3, 9]), [0, 2, 1], 2, 100, 2)
    assert [m.by_rank for m in plan] == [[[[2]], [[0]]], [[[1]], []]]
    monkeypatch.setattr("s2srm.distributed.rank", lambda: 1)
    assert [m.microbatches for m in plan] == [[[0]], []]


def test_waiting_is_counted_forward_by_forward():
    even = Minibatch([], [[4, 2], [4, 2]], 1)
    assert balance_metrics([even]) == {
        "balance/tokens_max_over_mean": 1.0,
        "balance/idle_fraction": 0.0,
    }
    # Ranks with 6 and 2 tokens: the second idles for 2 in the first forward and all the next.
    uneven = Minibatch([], [[4, 2], [2]], 1)
    assert balance_metrics([even, uneven]) == {
        "balance/tokens_max_over_mean": 6 / 4,
        "balance/idle_fraction": pytest.approx(4 / 24),
    }
