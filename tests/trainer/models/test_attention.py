"""The attention functions against one dense mask, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from s2srm.errors import UserError
from s2srm.models.attention import SDPA, _band, packed_flash, packed_sdpa
from s2srm.models.choice import choose_attention
from s2srm.models.flash import TORCH

packed_varlen = packed_flash(TORCH)
LENGTHS = (5, 1, 7)


def dense(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None
) -> Tensor:
    total = sum(LENGTHS)
    owner = torch.tensor([i for i, n in enumerate(LENGTHS) for _ in range(n)])
    distance = torch.arange(total)[:, None] - torch.arange(total)
    mask = (owner[:, None] == owner) & (distance >= 0)
    if window is not None:
        mask &= distance < window
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
def test_packed_sdpa_equals_a_dense_mask(window: int | None, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = (4, 2, 2)
    inputs = [
        torch.randn(1, h, sum(LENGTHS), 8, generator=generator, dtype=torch.float64) for h in heads
    ]
    packed = [x.clone().requires_grad_() for x in inputs]
    plain = [x.clone().requires_grad_() for x in inputs]
    cu_seqlens = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    found, _ = packed_sdpa(
        nn.Module(),
        *packed,
        attention_mask=None,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        cu_seq_lens_q=cu_seqlens,
    )
    wanted = dense(*plain, window, softcap)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    found.backward(upstream)
    wanted.backward(upstream)
    for a, b in zip(packed, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)


def test_attention_sinks_are_refused() -> None:
    x = torch.zeros(1, 2, 3, 4)
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    inputs = {"attention_mask": None, "cu_seq_lens_q": cu_seqlens, "max_length_q": 3}
    for function in (packed_sdpa, packed_varlen):
        with pytest.raises(UserError, match="sinks"):
            function(nn.Module(), x, x, x, s_aux=torch.zeros(2), **inputs)


@pytest.mark.parametrize("function", [packed_sdpa, packed_varlen])
def test_sparse_attention_is_refused(function: Callable[..., object]) -> None:
    """By a mask or indices, which select everything in sequences as short as the check's."""
    x = torch.zeros(1, 2, 3, 4)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(UserError, match="a mask of the model's own"):
        function(nn.Module(), x, x, x, mask, cu_seq_lens_q=cu_seqlens, max_length_q=3)
    with pytest.raises(UserError, match="block_indices is not supported"):
        inputs = {"cu_seq_lens_q": cu_seqlens, "max_length_q": 3}
        function(nn.Module(), x, x, x, None, block_indices=mask, **inputs)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9])
def test_a_band_is_cut_from_a_longer_one(length: int) -> None:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    found = _band(length, 3, torch.device("cpu"))
    assert torch.equal(found, (distance >= 0) & (distance < 3))


def test_choice_without_a_gpu() -> None:
    cpu = torch.device("cpu")
    assert choose_attention("auto", cpu, torch.float32) == SDPA
    assert choose_attention("sdpa", cpu, torch.float32) == SDPA
    with pytest.raises(UserError, match=r"attention: flash .*needs a CUDA device.*cpu"):
        choose_attention("flash", cpu, torch.float32)


def test_flash_needs_half_precision() -> None:
    with pytest.raises(UserError, match="bfloat16"):
        choose_attention("flash", torch.device("cuda", 0), torch.float32)
    assert choose_attention("auto", torch.device("cuda", 0), torch.float32) == SDPA
