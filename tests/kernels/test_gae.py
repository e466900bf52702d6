import time

import pytest
import torch

from s2srm_kernels import gae
from tests.kernels import naive

pytestmark = pytest.mark.usefixtures("backend")

CU = torch.tensor([0, 0, 1, 9, 9, 26, 90, 90], dtype=torch.int32)


def inputs(n=90, num_sequences=7, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(k, generator=g, dtype=torch.float64).to(dtype) for k in (n, n, num_sequences)
    )


@pytest.mark.parametrize("with_bootstrap", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1, 0.95), (0.9, 0.8), (1, 1), (0, 0.5), (0.99, 0)])
def test_equals_the_recursion(gamma, lam, with_bootstrap):
    rewards, values, bootstrap = inputs()
    options = {"gamma": gamma, "lam": lam, "bootstrap": bootstrap if with_bootstrap else None}
    ours = gae(rewards, values, CU, **options)
    torch.testing.assert_close(tuple(ours), naive.gae(rewards, values, CU, **options))
    assert ours.advantages.dtype == torch.float64


def test_float32_and_lower_give_float32():
    rewards, values, bootstrap = inputs(dtype=torch.float32)
    ours = gae(rewards, values, CU, bootstrap=bootstrap)
    exact = naive.gae(rewards.double(), values.double(), CU, bootstrap=bootstrap.double())
    torch.testing.assert_close(tuple(ours), tuple(e.float() for e in exact), rtol=1e-5, atol=1e-5)
    assert gae(rewards.bfloat16(), values, CU).returns.dtype == torch.float32
    assert gae(rewards.double(), values, CU).returns.dtype == torch.float64


def test_sequences_do_not_touch_each_other():
    rewards, values, bootstrap = inputs()
    clean = gae(rewards, values, CU, bootstrap=bootstrap).advantages
    rewards[9:26] = float("nan")
    values[9:26] = float("inf")
    dirty = gae(rewards, values, CU, bootstrap=bootstrap).advantages
    assert torch.equal(dirty[:9], clean[:9]) and torch.equal(dirty[26:], clean[26:])
    alone = gae(rewards[26:], values[26:], torch.tensor([0, 64]), bootstrap=bootstrap[5:6])
    assert torch.equal(alone.advantages, clean[26:])


def test_bootstrap_enters_at_the_last_row_alone():
    rewards, values = torch.zeros(5), torch.zeros(5)
    out = gae(
        rewards,
        values,
        torch.tensor([0, 2, 5]),
        gamma=0.5,
        lam=0.0,
        bootstrap=torch.tensor([8.0, 4.0]),
    )
    assert out.advantages.tolist() == [0, 4, 0, 0, 2]


def test_nothing_requires_a_gradient_and_strides_do_not_matter():
    rewards, values, _ = inputs(180)
    rewards.requires_grad_()
    out = gae(rewards[::2], values[::2], CU)
    same = gae(rewards[::2].contiguous(), values[::2].contiguous(), CU)
    assert not out.advantages.requires_grad and torch.equal(out.returns, same.returns)


@pytest.mark.parametrize("cu", [[0], [0, 0]])
def test_no_rows(cu):
    out = gae(torch.empty(0), torch.empty(0), torch.tensor(cu))
    assert out.advantages.shape == out.returns.shape == (0,)


def test_no_python_loop_over_tokens():
    n = 400_000
    cu = torch.arange(0, n + 1, 1000)
    start = time.process_time()
    gae(torch.ones(n), torch.ones(n), cu)
    assert time.process_time() - start < 2.0  # a loop over tokens takes several seconds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.5}, r"gamma.*1\.5"),
        ({"lam": float("nan")}, "lam.*nan"),
        ({"values": torch.zeros(89)}, r"values.*\(90,\).*\(89,\)"),
        ({"rewards": torch.zeros(90, 1)}, r"rewards.*\(90, 1\)"),
        ({"rewards": torch.zeros(90, dtype=torch.int64)}, "rewards.*int64"),
        ({"bootstrap": torch.zeros(6)}, r"bootstrap.*\(7,\).*\(6,\)"),
        ({"bootstrap": torch.zeros(7, dtype=torch.int32)}, "bootstrap.*int32"),
        ({"cu_seqlens": torch.tensor([0, 80])}, "cu_seqlens.* 90.* 80"),
        ({"cu_seqlens": torch.tensor([0, 50, 40, 90])}, "ascending"),
        ({"values": torch.zeros(90, device="meta")}, "values.*cpu.*meta"),
        ({"impl": "cuda"}, "impl.*'cuda'"),
    ],
)
def test_bad_input(change, message):
    rewards, values, _ = inputs()
    with pytest.raises(ValueError, match=message):
        gae(**{"rewards": rewards, "values": values, "cu_seqlens": CU, **change})
