"""Draws and chosen ids of the Triton engine."""

import pytest
import torch
import triton
import triton.language as tl

from s2srm_kernels import linear_logprobs, linear_sample, linear_token_stats
from s2srm_kernels.lm_head.noise import Noise, gumbel
from s2srm_kernels.triton import configs, sample
from tests.kernels import naive


@triton.jit
def _noise_kernel(seeds, positions, noise, first_id, COUNT: tl.constexpr):
    columns = tl.arange(0, COUNT)
    seed = tl.load(seeds + tl.arange(0, 1))[:, None]
    position = tl.load(positions + tl.arange(0, 1))[:, None]
    ids = (first_id + columns).to(tl.int64)[None, :]
    tl.store(noise + columns[None, :], sample.gumbel(seed, position, ids))


@pytest.mark.parametrize("key", [(0, 0), (-5, 2**40 + 3), (2**62, 1)])
def test_noise_is_the_references_to_the_last_bit(key):
    noise, keys = torch.empty(4096), Noise(*(torch.tensor([k]) for k in key))
    _noise_kernel[(1,)](*keys, noise, 37, 4096)
    assert torch.equal(noise, gumbel(keys, 37, 4096)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("columns", [1, 130, 600])
def test_draws(dtype, columns, monkeypatch):
    if dtype == torch.float16:
        monkeypatch.setattr(configs, "DESCRIPTOR_FAMILIES", {configs.INTERPRETER})
    hidden, weight, bias, _ = (t.detach() for t in naive.make(7, 32, columns, dtype=dtype))
    seeds, positions = torch.arange(7) * 2**55 - 3, torch.arange(7) * 2**31
    options = {"bias": bias, "softcap": 5.0, "temperature": 0.7}
    suppress = [columns - 1, 3] if columns > 4 else None
    ours, theirs, alone = (
        linear_sample(
            *(hidden[rows], weight, seeds[rows], positions[rows]),
            **(options | {"suppress": suppress, "impl": impl}),
        )
        for impl, rows in (("triton", slice(7)), ("reference", slice(7)), ("triton", slice(4, 5)))
    )
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(alone.tokens, ours.tokens[4:5])
    assert torch.equal(alone.logprobs, ours.logprobs[4:5])
    expected = linear_logprobs(hidden, weight, ours.tokens, impl="triton", **options)
    assert torch.equal(ours.logprobs, expected.logprobs)
    greedy, expected = (
        linear_sample(hidden, weight, seeds, positions, bias=bias, temperature=0, impl=impl)
        for impl in ("triton", "reference")
    )
    assert torch.equal(greedy.tokens, expected.tokens)


def test_chosen_ids():
    hidden, weight, bias, target = naive.make(70, 16, 300, dtype=torch.float64, seed=4)
    ids = torch.randint(300, (70, 3), generator=torch.Generator().manual_seed(0))
    ids[:, 1], ids[2, 0], ids[5, 2] = target.clamp(min=0), -1, ids[5, 0]
    options = {"bias": bias, "softcap": 5.0, "temperature": 0.7, "extra_ids": ids}
    ours, theirs = (
        linear_logprobs(hidden, weight, target, impl=impl, **options)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    live = target >= 0
    assert torch.equal(ours.extra_logprobs[live, 1], ours.logprobs[live])
    g = [torch.randn_like(t) for t in theirs]
    gradients = [
        torch.autograd.grad(list(result), (hidden, weight, bias), g) for result in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    stats = linear_token_stats(hidden, weight, target, impl="triton", **options)
    torch.testing.assert_close(stats.extra_logprobs, theirs.extra_logprobs, rtol=1e-9, atol=1e-9)
