"""gae and token_rewards compiled for the CPU, against the definition and the reference.

test_gae.py and test_token_rewards.py run on this backend as well.
"""

import shutil

import pytest
import torch
from torch.library import opcheck

from s2srm_kernels import gae, token_rewards
from s2srm_kernels.dispatch import load
from s2srm_kernels.options import pack_options
from tests.kernels import naive

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build with")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


@pytest.fixture(autouse=True)
def loaded():
    assert load("cpp") is None


def random_packing(seed, longest=40, num_sequences=60, dtype=torch.int64):
    """About a third of the sequences are empty, at both ends too."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(-longest // 2, longest, (num_sequences,), generator=g).clamp(min=0)
    lengths[0] = lengths[-1] = 0
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(dtype)


def normal(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("seed", range(6))
def test_gae_equals_the_recursion(seed):
    cu = random_packing(seed, dtype=INTEGERS[seed % 2])
    rewards, values = normal(2, int(cu[-1]), seed=seed)
    bootstrap = normal(cu.shape[0] - 1, seed=seed + 9) if seed % 3 else None
    options = {"gamma": (1.0, 0.9)[seed % 2], "lam": (0.95, 1.0, 0.0)[seed % 3]}
    ours = gae(rewards, values, cu, bootstrap=bootstrap, impl="cpp", **options)
    expected = naive.gae(rewards, values, cu, bootstrap=bootstrap, **options)
    torch.testing.assert_close(tuple(ours), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bootstrap_dtype", [None, *FLOATS])
@pytest.mark.parametrize("values_dtype", FLOATS)
@pytest.mark.parametrize("rewards_dtype", FLOATS)
def test_gae_of_any_dtypes_errs_at_most_as_the_reference(
    rewards_dtype, values_dtype, bootstrap_dtype
):
    cu = random_packing(1, longest=300)
    rewards = normal(int(cu[-1]), dtype=rewards_dtype)
    values = normal(int(cu[-1]), seed=1, dtype=values_dtype)
    bootstrap = None
    if bootstrap_dtype is not None:
        bootstrap = normal(cu.shape[0] - 1, seed=2, dtype=bootstrap_dtype)
    args = {"gamma": 0.99, "lam": 0.95, "bootstrap": bootstrap}
    ours = gae(rewards, values, cu, impl="cpp", **args)
    reference = gae(rewards, values, cu, impl="reference", **args)
    exact = gae(rewards.double(), values.double(), cu, impl="reference", **args)
    for got, eager, truth in zip(ours, reference, exact, strict=True):
        assert got.dtype == eager.dtype
        limit = 2 * (eager.double() - truth).abs().max() + 1e-15 * truth.abs().max()
        assert (got.double() - truth).abs().max() <= limit


@pytest.mark.parametrize("lam", [0.5, 1.0])
def test_a_long_float32_sequence_is_exact_but_for_its_rounding(lam):
    n = 200_000
    rewards, values = normal(2, n, dtype=torch.float32)
    cu = torch.tensor([0, n])
    ours = gae(rewards, values, cu, lam=lam, impl="cpp").advantages
    exact = gae(rewards.double(), values.double(), cu, lam=lam, impl="cpp").advantages
    assert torch.equal(ours, exact.float())


def test_a_rows_bits_depend_on_neither_threads_nor_neighbours():
    cu = random_packing(3, longest=2000, num_sequences=150)
    rewards, values = normal(2, int(cu[-1]), dtype=torch.float32)
    ids, best = torch.randint(0, 50, (2, int(cu[-1])))
    best = best.where(best > 2, ids)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                (
                    *gae(rewards, values, cu, impl="cpp"),
                    *token_rewards(ids, best, cu, impl="cpp"),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for b in (1, 40, 148):
        rows = slice(int(cu[b]), int(cu[b + 1]))
        alone = gae(rewards[rows], values[rows], cu[b : b + 2] - cu[b], impl="cpp")
        assert torch.equal(alone.advantages, results[0][0][rows])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("response_dtype", INTEGERS)
@pytest.mark.parametrize("signal_dtype", INTEGERS)
def test_token_rewards_equal_the_definition(signal_dtype, response_dtype, seed):
    cu = random_packing(seed)
    g = torch.Generator().manual_seed(seed)
    response, signal = torch.randint(0, 3, (2, int(cu[-1])), generator=g)
    signal = signal.where(torch.rand(signal.shape, generator=g) < 0.1, response)
    amounts = {"positive": 0.5, "negative": 2.0, "match": 0.25}
    for divergence, agree in (("argmax", signal == response), ("rank", signal < 2)):
        ours = token_rewards(
            response.to(response_dtype),
            signal.to(signal_dtype),
            cu,
            divergence=divergence,
            top_k=2,
            impl="cpp",
            **amounts,
        )
        rewards, index = naive.token_rewards(response, agree, cu, **amounts)
        assert ours.rewards.dtype == torch.float32
        assert ours.rewards.tolist() == rewards.tolist()
        assert ours.divergence_index.tolist() == index.tolist()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_margin_is_compared_as_torch_compares_it(dtype):
    """0.3 is rounded to the signal's dtype before, so that equal numbers agree."""
    signal = torch.tensor([0.3, 0.2999, 0.3, 0.31, 0.3, float("nan"), -float("inf")], dtype=dtype)
    options = {"divergence": "margin", "max_margin": 0.3, "match": 0.5}
    args = (torch.zeros(7, dtype=torch.int64), signal, torch.tensor([0, 2, 7]))
    ours, reference = (token_rewards(*args, impl=i, **options) for i in ("cpp", "reference"))
    assert ours.rewards.dtype == reference.rewards.dtype
    assert ours.rewards.tolist() == reference.rewards.tolist()
    assert ours.divergence_index.tolist() == reference.divergence_index.tolist() == [2, 1]


def test_an_int32_rank_below_a_top_k_that_int32_cannot_hold():
    rank, cu = torch.tensor([5, 2**31 - 1], dtype=torch.int32), torch.tensor([0, 2])
    out = token_rewards(rank, rank, cu, divergence="rank", top_k=2**40, impl="cpp")
    assert out.divergence_index.tolist() == [2]


def test_strides_do_not_matter_and_inputs_stay():
    cu = random_packing(2)
    n = int(cu[-1])
    wide = normal(n, 6, dtype=torch.float32)
    copies = wide.clone()
    spread = torch.stack([cu, cu + 7], dim=1)[:, 0]
    bootstrap = normal(2 * (cu.shape[0] - 1))[::2]
    ours = gae(wide[:, 1], wide.t()[3], spread, bootstrap=bootstrap, impl="cpp")
    same = gae(
        *(wide[:, 1].contiguous(), wide[:, 3].contiguous(), cu),
        bootstrap=bootstrap.contiguous(),
        impl="cpp",
    )
    assert torch.equal(ours.advantages, same.advantages) and torch.equal(wide, copies)
    ids = (wide * 2).long()
    ours = token_rewards(ids[:, 0], ids[:, 1], spread, impl="cpp")
    same = token_rewards(ids[:, 0].contiguous(), ids[:, 1].contiguous(), cu, impl="cpp")
    assert torch.equal(ours.rewards, same.rewards)


@pytest.mark.parametrize("cu", [[0], [0, 0], [0] * 100_001])
def test_no_rows(cu):
    cu = torch.tensor(cu)
    out = gae(torch.empty(0), torch.empty(0), cu, impl="cpp")
    assert out.advantages.shape == out.returns.shape == (0,)
    ids = torch.empty(0, dtype=torch.int64)
    out = token_rewards(ids, ids, cu, impl="cpp")
    assert out.rewards.shape == (0,) and not out.divergence_index.any()


@pytest.mark.parametrize(
    "cu",
    [
        [1, 9],
        [0, 8],
        [0, 12],
        [0, 5, 4, 9],
        [0, 5, 12, 9],
        [0, 9, -(2**31), 9],
        [-3, 9],
        [9, 0],
        [2**40, 9],
    ],
)
def test_bad_cu_seqlens_are_refused_in_the_references_words(cu):
    cu = torch.tensor(cu)
    rows, ids = torch.zeros(9), torch.zeros(9, dtype=torch.int64)
    for op, args in ((gae, (rows, rows)), (token_rewards, (ids, ids))):
        said = []
        for impl in ("reference", "cpp"):
            with pytest.raises(ValueError, match="cu_seqlens") as caught:
                op(*args, cu, impl=impl)
            said.append(str(caught.value))
        assert said[0] == said[1]


ROWS, IDS, CU = torch.zeros(9), torch.zeros(9, dtype=torch.int64), torch.tensor([0, 9])
GAE = pack_options(gamma=1.0, lam=1.0)
REWARDS = pack_options(max_margin=0.0, positive=1.0, negative=1.0, match=0.0)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("gae", (ROWS, ROWS[1:], CU, GAE, None), r"values must have shape \(9,\)"),
        ("gae", (ROWS[None], ROWS, CU, GAE, None), r"rewards must have shape \(9,\)"),
        ("gae", (ROWS, IDS, CU, GAE, None), "values must be floating, got Long"),
        ("gae", (ROWS, ROWS, CU, GAE, ROWS), r"bootstrap must have shape \(1,\)"),
        ("gae", (ROWS, ROWS, CU.float(), GAE, None), "cu_seqlens must be int64 or int32"),
        ("gae", (ROWS, ROWS, CU[:0], GAE, None), r"cu_seqlens must have shape \(B \+ 1,\)"),
        ("gae", (ROWS, ROWS, CU, GAE[:1], None), r"options must be \(2,\) float64 on the CPU"),
        ("gae", (ROWS, ROWS, CU, GAE.float(), None), "options must be"),
        ("token_rewards", (IDS, IDS[1:], CU, REWARDS, "argmax", 1), "signal must have shape"),
        ("token_rewards", (ROWS, IDS, CU, REWARDS, "argmax", 1), "response must be int64"),
        ("token_rewards", (IDS, ROWS, CU, REWARDS, "rank", 1), "signal must be int64"),
        ("token_rewards", (IDS, IDS, CU, REWARDS, "margin", 1), "signal must be floating"),
        ("token_rewards", (IDS, IDS, CU, REWARDS, "cosine", 1), "divergence.*'cosine'"),
    ],
)
def test_the_raw_operators_read_nothing_out_of_bounds(name, args, message):
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.s2srm, name).cpp(*args)


def test_opcheck():
    cu, rows = torch.tensor([0, 0, 4, 9], dtype=torch.int32), torch.linspace(-1, 1, 9)
    for bootstrap in (None, torch.ones(3), torch.ones(3, dtype=torch.float64)):
        opcheck(torch.ops.s2srm.gae.cpp, (rows, rows, cu, GAE, bootstrap))
    ids = torch.arange(9)
    for divergence, signal in (("argmax", ids), ("rank", ids), ("margin", rows.double())):
        args = (ids, signal, cu, REWARDS, divergence, 1)
        opcheck(torch.ops.s2srm.token_rewards.cpp, args)
