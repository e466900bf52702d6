"""What an engine holds, against sums by hand: 1000 trained parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest

from s2srm.plan.states import Trainee, ZeroSizes, torch_engine, zero_engine

FULL = Trainee(1000, 1000, 400, 100, 0, 4, "adamw")
HALF = replace(FULL, itemsize=2)
FROZEN = replace(HALF, trained=0, optimizer=None)
SIZES = ZeroSizes(reduce_bucket=500, prefetch_bucket=10, max_live=600, max_reuse=600, sub_group=300)


def zero(model, stage=3, ranks=4, offload=False):
    return zero_engine(model, stage, ranks, offload, SIZES)


def test_one_process_holds_everything_whole():
    full, half = torch_engine(FULL), torch_engine(HALF)
    assert (full.weights, full.master, full.gradients, full.optimiser) == (4000, 0, 4000, 8000)
    assert (half.weights, half.master, half.gradients, half.optimiser) == (2000, 4000, 4000, 8000)
    assert torch_engine(replace(FULL, optimizer="sgd")).optimiser == 0


def test_a_frozen_model_is_its_weights():
    assert torch_engine(FROZEN) == replace(torch_engine(FROZEN), weights=2000)
    assert torch_engine(FROZEN).gradients == 0
    assert zero(FROZEN).weights == 500
    assert zero(FROZEN, stage=1).weights == 2000


def test_zero_3_holds_a_part_and_gathers_up_to_its_limits():
    part = zero(HALF)
    assert (part.weights, part.master, part.gradients_held, part.optimiser) == (
        *(500, 1000, 1000),
        2000,
    )
    assert part.step == 250 * 4
    assert part.buckets == part.reduction == 500 * 2
    assert part.live == (600 + 100 + 10) * 2
    assert part.whole == 2000


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bucket_is_never_larger_than_the_model(stage):
    assert zero_engine(HALF, stage, 4, False, ZeroSizes()).buckets == 2000


def test_zero_1_and_2_differ_in_gradients_alone():
    one, two = zero(HALF, stage=1), zero(HALF, stage=2)
    assert one.gradients == 4000
    assert two.gradients == 1000
    assert replace(one, gradients=0) == replace(two, gradients=0)
    assert (one.weights, one.master, one.optimiser) == (2000, 1000, 2000)


def test_offload_moves_masters_moments_and_gradients_to_the_host():
    part = zero(HALF, offload=True)
    assert (part.master, part.optimiser, part.gradients_held, part.step) == (0, 0, 0, 0)
    assert part.host == pytest.approx(3 * 1000 + 2000)
    assert zero(FROZEN, offload=True).host == 500
