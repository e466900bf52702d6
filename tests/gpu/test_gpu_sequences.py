"""gae and token_rewards on the GPU, against loops in float64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.providers.ours import unavailable
from s2srm_kernels import gae, token_rewards

IMPLS = ("cpp", "reference")
LENGTHS = (
    [1],
    [0, 3, 0, 0, 5, 1, 0],
    [1000],
    [33] * 40,
    [5000, 1, 0, 2049, 64, 63, 65],
    [40000],
)


def packed(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def available(op, impl, device):
    reason = unavailable(op, impl, device)
    if reason is not None:
        if impl == "cpp":
            pytest.fail(reason)
        pytest.skip(reason)


def loop_gae(rewards, values, cu_seqlens, gamma, lam, bootstrap):
    advantages = [0.0] * len(rewards)
    bounds = zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    r, v = rewards.double().tolist(), values.double().tolist()
    for index, (start, end) in enumerate(bounds):
        following, next_value = 0.0, 0.0 if bootstrap is None else float(bootstrap[index])
        for t in range(end - 1, start - 1, -1):
            following = r[t] + gamma * next_value - v[t] + gamma * lam * following
            advantages[t], next_value = following, v[t]
    made = torch.tensor(advantages, dtype=torch.float64)
    return made, made + values.double()


def loop_token_rewards(agree, cu_seqlens, positive, negative, match):
    rewards, index = [], []
    agree = agree.tolist()
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        first = next((t for t in range(start, end) if not agree[t]), end)
        rewards += [positive] * (first - start)
        rewards += [match if agree[t] else -negative for t in range(first, end)]
        index.append(first - start)
    return torch.tensor(rewards), torch.tensor(index, dtype=torch.int64)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}x{lengths[0]}")
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.8), (1.0, 1.0), (0.9, 0.0)])
def test_gae(lengths, gamma, lam, impl, device):
    available("gae", impl, device)
    cu_seqlens = packed(lengths)
    generator = torch.Generator().manual_seed(len(lengths))
    rewards, values = torch.randn(2, sum(lengths), generator=generator)
    bootstrap = torch.randn(len(lengths), generator=generator) if lam == 0.8 else None
    made = gae(
        *(rewards.to(device), values.to(device), cu_seqlens.to(device, torch.int32)),
        gamma=gamma,
        lam=lam,
        bootstrap=None if bootstrap is None else bootstrap.to(device),
        impl=impl,
    )
    expected = loop_gae(rewards, values, cu_seqlens, gamma, lam, bootstrap)
    for value, right in zip(made, expected, strict=True):
        error = (value.cpu().double() - right).norm() / right.norm()
        assert error < 2e-6, float(error)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}x{lengths[0]}")
@pytest.mark.parametrize("divergence", ("argmax", "rank", "margin"))
def test_token_rewards(divergence, lengths, impl, device):
    available("token_rewards", impl, device)
    cu_seqlens = packed(lengths)
    generator = torch.Generator().manual_seed(len(lengths))
    n = sum(lengths)
    response = torch.randint(100, (n,), generator=generator)
    agree = torch.rand(n, generator=generator) < 1 - 2 / max(lengths)
    if divergence == "argmax":
        signal, options = torch.where(agree, response, response + 1), {}
    elif divergence == "rank":
        signal, options = torch.where(agree, 2, 3), {"top_k": 3}
    else:
        signal, options = torch.where(agree, 0.5, torch.nan), {"max_margin": 0.5}
    made = token_rewards(
        *(response.to(device), signal.to(device), cu_seqlens.to(device)),
        divergence=divergence,
        positive=1.5,
        negative=0.5,
        match=0.25,
        impl=impl,
        **options,
    )
    rewards, index = loop_token_rewards(agree, cu_seqlens, 1.5, 0.5, 0.25)
    assert torch.equal(made.rewards.cpu(), rewards)
    assert torch.equal(made.divergence_index.cpu(), index)


@pytest.mark.parametrize("impl", IMPLS)
def test_gae_twice_and_in_another_batch(impl, device):
    available("gae", impl, device)
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 9000, generator=generator).to(device)
    cu_seqlens = packed([5000, 1000, 3000]).to(device)
    first, second = (gae(rewards, values, cu_seqlens, impl=impl) for _ in range(2))
    assert torch.equal(first.advantages, second.advantages)
    alone = gae(rewards[:5000], values[:5000], packed([5000]).to(device), impl=impl)
    assert torch.equal(alone.advantages, first.advantages[:5000])


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl, device):
    available("gae", impl, device)
    empty, cu_seqlens = torch.empty(0, device=device), torch.zeros(3, dtype=torch.int32)
    assert gae(empty, empty, cu_seqlens.to(device), impl=impl).returns.shape == (0,)
    made = token_rewards(empty.long(), empty.long(), cu_seqlens.to(device), impl=impl)
    assert made.rewards.shape == (0,)
    assert made.divergence_index.tolist() == [0, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_cu_seqlens(impl, device):
    available("gae", impl, device)
    rows = torch.ones(5, device=device)
    for bounds in ([0, 4], [1, 5], [0, 3, 2, 5]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            gae(rows, rows, torch.tensor(bounds, device=device), impl=impl)
