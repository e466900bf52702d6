"""Prompts, shuffles and minibatches that do not depend on the number of ranks."""

from collections import Counter

from s2srm.ppo.minibatches import Rollouts, permutation, plan_epoch, prompt_schedule
from s2srm.rollout.base import Response


def rollouts(lengths):
    return Rollouts(
        index=list(range(len(lengths))),
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


def test_minibatches_cover_every_response_once_and_count_their_tokens():
    lengths = [1, 9, 3, 3, 5, 2, 8]
    order = permutation(7, 0, 0, 0)
    plan = plan_epoch(rollouts(lengths), order, minibatch_size=3, microbatch_tokens=12)
    assert [sum(map(len, m.microbatches)) for m in plan] == [3, 3, 1]
    for number, minibatch in enumerate(plan):
        members = sorted(i for group in minibatch.microbatches for i in group)
        assert members == sorted(order[3 * number : 3 * number + 3])
        assert minibatch.num_tokens == sum(lengths[i] for i in members)
        for group in minibatch.microbatches:
            assert len(group) == 1 or sum(lengths[i] + 2 for i in group) <= 12


def test_a_rank_without_a_response_in_a_minibatch_has_no_microbatch():
    mine = Rollouts([1, 3], [[5], [5]], [Response([7], False), Response([7, 7], False)])
    plan = plan_epoch(mine, [0, 2, 3, 1], minibatch_size=2, microbatch_tokens=100)
    assert [m.microbatches for m in plan] == [[], [[1, 0]]]
