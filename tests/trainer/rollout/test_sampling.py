"""Draws on a tree: their distribution, the numbers that they take, what rounding does to them."""

import pytest
import torch

from s2srm.rollout.sampling import FAN_OUT, SeededSampling, choose, num_levels

SIZES = [1, 2, FAN_OUT, FAN_OUT + 1, 300, FAN_OUT**2, FAN_OUT**2 + 5]


@pytest.mark.parametrize("size", SIZES)
def test_every_token_comes_as_often_as_its_weight_says(size):
    # The numbers of the lowest level on a grid; those above it random: 30,000 draws.
    torch.manual_seed(size)
    weights = torch.rand(size) ** 4
    weights[torch.rand(size) < 0.2] = 0.0
    weights[-1] = 0.5
    count = 30_000
    uniforms = torch.rand(count, num_levels(size), dtype=torch.float64)
    drawn = choose(weights.expand(count, -1), uniforms).bincount(minlength=size).double()
    expected = weights.double() / weights.double().sum() * count
    assert drawn.shape == (size,) and not drawn[weights == 0].any()
    deviation = (drawn - expected) / expected.clamp_min(1.0).sqrt()
    # Of 1029 tokens the largest of as many normal deviations is about 3.3.
    assert deviation.abs().max() < 6


@pytest.mark.parametrize("size", SIZES)
def test_the_ends_of_the_unit_interval_draw_the_first_and_last_token_with_weight(size):
    weights = torch.rand(1, size) + 0.01
    weights[0, : size // 3] = 0.0
    weights[0, size - size // 4 :] = 0.0
    low = torch.zeros(1, num_levels(size), dtype=torch.float64)
    assert choose(weights, low).item() == size // 3
    assert choose(weights, low + 1 - 2**-53).item() == size - size // 4 - 1


def test_rounding_of_the_logits_changes_hardly_any_draw():
    # Of 2560 such draws, with a nudge far above rounding, a plain CDF changed 240 and the tree 7.
    generator = torch.Generator().manual_seed(0)
    count, size = 256, 40_000
    logits = torch.randn(count, size, generator=generator)
    nudged = logits + 1e-3 * torch.randn(count, size, generator=generator)
    seeds = list(range(count))
    before, after = (
        SeededSampling(seeds, 1.0, 1, (), torch.device("cpu"))(torch.zeros(count, 1), x).argmax(-1)
        for x in (logits, nudged)
    )
    assert (before != after).sum() <= 5


def test_a_draw_depends_on_its_own_seed_and_number_alone():
    torch.manual_seed(0)
    scores = torch.randn(3, 50)
    device = torch.device("cpu")
    whole = SeededSampling([1, 2, 3], 0.7, 4, [7], device)
    first, second = (whole(torch.zeros(3, 1), scores) for _ in range(2))
    alone = SeededSampling([3], 0.7, 9, [7], device)
    assert torch.equal(alone(torch.zeros(1, 1), scores[2:])[0], first[2])
    assert torch.equal(alone(torch.zeros(1, 1), scores[2:])[0], second[2])
    kept = SeededSampling([1, 2, 3], 0.7, 4, [7], device)
    kept(torch.zeros(3, 1), scores)
    kept.keep(torch.tensor([0, 2]))
    assert torch.equal(kept(torch.zeros(2, 1), scores[[0, 2]]), second[[0, 2]])
