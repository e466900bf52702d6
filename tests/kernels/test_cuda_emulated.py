"""The CUDA kernels themselves, compiled for the CPU: emulator/ says what that can show.

Every call runs on a small grid of tiles, with several blocks in flight and pauses at random.
"""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from s2srm_kernels import gae
from tests.kernels import naive

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
TILE = 512  # rows of the small shape
NO_DESCENT = 2**63 - 1
PACKINGS = {
    "one row": [1],
    "nothing": [0, 0],
    "one long": [0, 9 * TILE + 77, 0],
    "a tile exactly": [TILE, 2 * TILE],
    "borders at tiles": [TILE - 1, 1, TILE, 1, TILE - 1, 3],
    "long then short": [3 * TILE + 5, 0, 0, 1, 1, 2, 3 * TILE],
    "rows alone": [1] * (2 * TILE + 1),
    "mixed": [700, 0, 3, 4, 4, 0, 128, 129, 2000, 1, 31, 33, 0, 0, 900, 5, 0],
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile with")


class Grid(ctypes.Structure):
    _fields_ = [
        ("cu_seqlens", ctypes.c_void_p),
        ("wide", ctypes.c_int),
        ("num_sequences", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("resident", ctypes.c_int),
        ("seed", ctypes.c_uint),
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    checks = "-fsanitize=bounds,shift,signed-integer-overflow,alignment"
    command = ["g++", "-std=c++20", "-O2", "-fPIC", "-shared", "-pthread", "-Wno-unknown-pragmas"]
    command += [checks, "-fsanitize-undefined-trap-on-error", "-I", str(CSRC)]
    command += [str(HERE / "emulator" / "kernels.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def pack(lengths, dtype=torch.int32):
    cu = [0]
    for length in lengths:
        cu.append(cu[-1] + length)
    return torch.tensor(cu, dtype=dtype)


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def make_grid(cu, num_rows, resident=4, seed=0):
    return Grid(cu.data_ptr(), cu.dtype == torch.int64, cu.shape[0] - 1, num_rows, resident, seed)


def run_gae(kernels, rewards, values, cu, gamma, lam, bootstrap=None, full=False, **grid):
    out = torch.full((2, rewards.shape[0] + 1), float("nan"), dtype=rewards.dtype)
    advantages, returns = (row[:-1].clone() for row in out)
    report = torch.zeros(3, dtype=torch.int64)
    kernels.gae(
        ctypes.byref(make_grid(cu, rewards.shape[0], **grid)),
        *(rewards.dtype == torch.float64, full, pointer(rewards), pointer(values)),
        *(pointer(bootstrap), ctypes.c_double(gamma), ctypes.c_double(lam)),
        *(pointer(advantages), pointer(returns), pointer(report)),
    )
    return advantages, returns, report.tolist()


def run_rewards(kernels, response, signal, cu, kind, amounts, top_k=1, max_margin=0.0, **grid):
    dtype = torch.float64 if kind == "margin64" else torch.float32
    rewards = torch.full(signal.shape, float("nan"), dtype=dtype)
    index = torch.full((cu.shape[0] - 1,), -7)
    report = torch.zeros(3, dtype=torch.int64)
    kernels.token_rewards(
        *(ctypes.byref(make_grid(cu, signal.shape[0], **grid)), kind.encode(), pointer(response)),
        *(pointer(signal), ctypes.c_int64(top_k), ctypes.c_double(max_margin)),
        *((ctypes.c_double * 3)(*amounts), pointer(rewards), pointer(index), pointer(report)),
    )
    return rewards, index, report.tolist()


def recursion(rewards, values, cu, gamma, lam, bootstrap=None):
    """naive.gae in float64 without a tensor for every number."""
    r, v, bounds = rewards.tolist(), values.tolist(), cu.tolist()
    advantages = [0.0] * len(r)
    for b, (start, end) in enumerate(itertools.pairwise(bounds)):
        following, next_value = 0.0, 0.0 if bootstrap is None else float(bootstrap[b])
        for t in reversed(range(start, end)):
            following = r[t] + gamma * next_value - v[t] + gamma * lam * following
            advantages[t], next_value = following, v[t]
    exact = torch.tensor(advantages, dtype=torch.float64)
    return exact, exact + values


def test_the_recursion_is_the_definition():
    cu, (rewards, values) = pack([3, 0, 7, 1]), normal(2, 11)
    args = (rewards, values, cu, 0.9, 0.8, normal(4, seed=1))
    torch.testing.assert_close(recursion(*args), naive.gae(*args))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("wide", [torch.int32, torch.int64])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.97), (0.9, 0.0)])
@pytest.mark.parametrize("packing", PACKINGS)
def test_gae_equals_the_recursion(kernels, packing, gamma, lam, wide):
    cu = pack(PACKINGS[packing], wide)
    num_rows, num_sequences = int(cu[-1]), cu.shape[0] - 1
    rewards, values = normal(2, num_rows)
    for bootstrap in (None, normal(num_sequences, seed=1)):
        advantages, returns, report = run_gae(kernels, rewards, values, cu, gamma, lam, bootstrap)
        expected = recursion(rewards, values, cu, gamma, lam, bootstrap)
        torch.testing.assert_close((advantages, returns), expected, rtol=1e-12, atol=1e-11)
        assert report == [0, NO_DESCENT, num_rows]


@pytest.mark.parametrize("packing", PACKINGS)
def test_float32_gae_has_the_same_bits_whatever_the_timing(kernels, packing):
    cu = pack(PACKINGS[packing])
    rewards, values = normal(2, int(cu[-1])).float()
    first = run_gae(kernels, rewards, values, cu, 1.0, 1.0, resident=1)
    exact = recursion(rewards, values, cu, 1.0, 1.0)
    torch.testing.assert_close(first[0].double(), exact[0], rtol=1e-5, atol=1e-4)
    for seed in range(4):
        again = run_gae(kernels, rewards, values, cu, 1.0, 1.0, resident=9, seed=seed)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


def test_a_first_block_that_is_late_holds_up_more_tiles_than_a_warp_sees(kernels):
    num_rows = 70 * TILE
    cu = pack([num_rows])
    rewards, values = normal(2, num_rows)
    ours = run_gae(kernels, rewards, values, cu, 1.0, 0.999, resident=70)[:2]
    torch.testing.assert_close(ours, recursion(rewards, values, cu, 1.0, 0.999))
    signal = torch.zeros(num_rows, dtype=torch.int64)
    for first in (3, 69 * TILE + 5):  # before all the tiles that let it through, and after
        signal[first] = 1
        rewards, index, _ = run_rewards(
            kernels, None, signal, cu, "rank64", (1, 1, 0), top_k=1, resident=70
        )
        assert index.tolist() == [first]
        assert (rewards[:first] == 1).all() and (rewards[first + 1 :] == 0).all()
        signal[first] = 0


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.9999)])
@pytest.mark.parametrize("lengths", [[90_000], [8192, 1, 0, 20_000, 3, 4095] + [60] * 500])
def test_the_shape_that_runs_on_a_gpu_errs_at_most_twice_as_the_reference(
    kernels, lengths, gamma, lam
):
    cu = pack(lengths)
    rewards, values = normal(2, int(cu[-1])).float()
    exact = recursion(rewards, values, cu, gamma, lam)
    ours = run_gae(kernels, rewards, values, cu, gamma, lam, full=True)
    reference = gae(rewards, values, cu, gamma=gamma, lam=lam, impl="reference")
    for got, eager, truth in zip(ours, reference, exact, strict=False):
        error = (got.double() - truth).abs().max()
        assert error <= 2 * (eager.double() - truth).abs().max()
    doubles = run_gae(kernels, rewards.double(), values.double(), cu, gamma, lam, full=True)
    torch.testing.assert_close(doubles[0], exact[0], rtol=1e-11, atol=1e-10)


def test_what_is_not_finite_stays_in_its_sequence(kernels):
    cu = pack([600, 700, 5, 2000, 1])
    rewards, values = normal(2, int(cu[-1]))
    clean, _, _ = run_gae(kernels, rewards, values, cu, 1.0, 0.9)
    rewards[1299], values[600] = float("inf"), float("nan")
    dirty, _, _ = run_gae(kernels, rewards, values, cu, 1.0, 0.9)
    assert torch.equal(dirty[:600], clean[:600]) and torch.equal(dirty[1300:], clean[1300:])
    assert not dirty[600:1300].isfinite().any()


def test_slices_that_begin_anywhere(kernels):
    cu = pack([1500, 30])
    rewards, values = normal(2, 1533).float()
    aligned = run_gae(kernels, rewards[3:].clone(), values[1:-2].clone(), cu, 0.9, 0.9)
    sliced = run_gae(kernels, rewards[3:], values[1:-2], cu, 0.9, 0.9)
    assert torch.equal(aligned[0], sliced[0])


@pytest.mark.parametrize("chance", [0.0, 0.002, 0.3, 1.0])
@pytest.mark.parametrize("packing", PACKINGS)
def test_token_rewards_equal_the_definition(kernels, packing, chance):
    cu = pack(PACKINGS[packing], torch.int64 if chance == 0.3 else torch.int32)
    generator = torch.Generator().manual_seed(5)
    response = torch.randint(0, 9, (int(cu[-1]),), generator=generator)
    diverges = torch.rand(response.shape, generator=generator) < chance
    signal = torch.where(diverges, response + 1, response)
    amounts = (0.5, 2.0, 0.25)
    expected, expected_index = naive.token_rewards(response, (~diverges).tolist(), cu, *amounts)
    for kind in ("argmax64/64", "argmax64/32", "argmax32/64", "argmax32/32"):
        types = [torch.int64 if bits == "64" else torch.int32 for bits in kind[6:].split("/")]
        rewards, index, report = run_rewards(
            kernels, response.to(types[0]), signal.to(types[1]), cu, kind, amounts, resident=5
        )
        assert rewards.tolist() == expected.tolist() and index.tolist() == expected_index.tolist()
        assert report == [0, NO_DESCENT, response.shape[0]]


@pytest.mark.parametrize("kind", ["rank64", "rank32", "margin32", "margin64"])
def test_token_rewards_from_rank_and_margin(kernels, kind):
    cu = pack(PACKINGS["mixed"])
    signal = torch.randint(0, 400, (int(cu[-1]),), generator=torch.Generator().manual_seed(0))
    agree, dtype = signal < 398, torch.int64 if kind == "rank64" else torch.int32
    if kind.startswith("margin"):
        dtype = torch.float32 if kind == "margin32" else torch.float64
        signal = torch.where(signal == 399, float("nan"), signal.double())
        agree = signal <= 397
    signal = signal.to(dtype)[1:].clone().roll(1)  # any order will do; 16 bytes off below
    shifted = torch.cat([signal[:1], signal])[1:]
    agree = agree[1:].roll(1)
    cu[-2:] -= 1
    options = {"top_k": 398, "max_margin": 397.0}
    rewards, index, _ = run_rewards(kernels, None, shifted, cu, kind, (1, 1, 0), **options)
    expected, expected_index = naive.token_rewards(signal, agree.tolist(), cu)
    assert rewards.tolist() == expected.tolist() and index.tolist() == expected_index.tolist()


@pytest.mark.parametrize(
    "cu",
    [
        [1, 3000],
        [0, 2000],
        [0, 4000],
        [0, 2000, 1000, 3000],
        [-5000, 0, 3000],
        [3000, 0],
        [0, 2**31 - 1, -(2**31), 3000],
        [0, 10, 5, 20, 15, 3000, 2000, 9999],
    ],
)
def test_bad_cu_seqlens_are_reported_and_touch_nothing_else(kernels, cu):
    cu = torch.tensor(cu, dtype=torch.int32)
    guard = 4096
    rows = normal(3, 3000 + 2 * guard).float()
    bootstrap = normal(cu.shape[0] - 1).float()
    inside = rows[:, guard:-guard]
    before = rows.clone()
    report = torch.zeros(3, dtype=torch.int64)
    kernels.gae(
        ctypes.byref(make_grid(cu, 3000)),
        *(False, False, pointer(inside[0]), pointer(inside[0]), pointer(bootstrap)),
        *(ctypes.c_double(0.9), ctypes.c_double(0.9)),
        *(pointer(inside[1]), pointer(inside[2]), pointer(report)),
    )
    assert torch.equal(rows[:, :guard], before[:, :guard])
    assert torch.equal(rows[:, -guard:], before[:, -guard:])
    descents = (cu.long().diff() < 0).nonzero().flatten().tolist()
    assert report.tolist() == [int(cu[0]), [*descents, NO_DESCENT][0], int(cu[-1])]
    index = torch.full((cu.shape[0] + 1,), -7)
    signal = torch.randint(0, 2, (3000,))
    kernels.token_rewards(
        *(ctypes.byref(make_grid(cu, 3000)), b"rank64", None, pointer(signal), ctypes.c_int64(1)),
        *(ctypes.c_double(0), (ctypes.c_double * 3)(1, 1, 0), pointer(inside[1])),
        *(pointer(index[1:]), pointer(report)),
    )
    assert index[0] == index[-1] == -7
    assert torch.equal(rows[:, :guard], before[:, :guard])
    assert torch.equal(rows[:, -guard:], before[:, -guard:])
