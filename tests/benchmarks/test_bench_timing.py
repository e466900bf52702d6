import multiprocessing
import time

import pytest
import torch

from benchmarks import timing


def test_calls_take_turns_in_an_order_that_rotates(cpu):
    order = []
    calls = {name: lambda name=name: (order.append(name), time.sleep(0.002)) for name in "abc"}
    times = timing.time_in_turns(calls, cpu, seconds=0.0, rounds=(4, 10))
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}
    # Two warm-up calls each come first.
    assert "".join(order[6:]) == "abc" + "bca" + "cab" + "abc"
    assert all(value >= 2 for values in times.values() for value in values)


def test_rounds_follow_the_time(cpu):
    calls = {"sleep": lambda: time.sleep(0.005)}
    times = timing.time_in_turns(calls, cpu, seconds=0.05, rounds=(1, 100))
    assert 1 <= len(times["sleep"]) <= 10
    assert len(timing.time_in_turns(calls, cpu, seconds=99.0, rounds=(1, 3))["sleep"]) == 3


def test_one_that_is_far_slower_has_two_rounds(cpu):
    calls = {
        "slow": lambda: time.sleep(0.3),
        "quick": lambda: time.sleep(0.002),
        "other": lambda: time.sleep(0.002),
    }
    times = timing.time_in_turns(calls, cpu, seconds=0.1, rounds=(5, 6))
    assert len(times["slow"]) == 2
    assert len(times["quick"]) == len(times["other"]) >= 5


def test_all_are_slow_on_a_large_shape(cpu):
    calls = {"one": lambda: time.sleep(0.05), "other": lambda: time.sleep(0.06)}
    times = timing.time_in_turns(calls, cpu, seconds=0.01, rounds=(3, 9))
    assert [len(values) for values in times.values()] == [3, 3]


def test_short_calls_are_repeated_within_a_turn(cpu):
    count = [0]

    def call():
        count[0] += 1

    times = timing.time_in_turns({"short": call}, cpu, seconds=0.0, rounds=(2, 2))
    assert 2 + 2 * 10 < count[0] <= 2 + 2 * 50
    assert len(times["short"]) == 2


def test_quantiles():
    values = [float(v) for v in range(11)]
    assert timing.quantiles(values) == (2.0, 5.0, 8.0)
    assert timing.quantiles([3.0]) == (3.0, 3.0, 3.0)


def peak_of_48_mib(sampled):
    if sampled:
        timing._reset_high_water_mark = lambda: False

    def call():
        first = torch.ones(48 * 2**20, dtype=torch.uint8)
        time.sleep(0.02)
        del first
        return torch.ones(16 * 2**20, dtype=torch.uint8)

    call()
    return timing.peak_extra_bytes(call, torch.device("cpu")) / 2**20


@pytest.mark.parametrize("sampled", [False, True])
def test_peak_memory_of_a_known_allocation(sampled):
    """In a fresh process: one that has built an engine keeps what it frees (engine/heap.py)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert 44 < pool.apply(peak_of_48_mib, (sampled,)) < 56


def test_peak_memory_counts_the_result(cpu):
    def call():
        return torch.ones(32 * 2**20, dtype=torch.uint8)

    call()
    assert 30 < timing.peak_extra_bytes(call, cpu) / 2**20 < 40


def test_no_kernels_on_a_cpu(cpu):
    assert timing.kernel_ms(lambda: None, cpu) is None
