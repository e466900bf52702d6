"""Attention on the GPU: every FlashAttention that is here, and SDPA, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from s2srm.models import flash
from s2srm.models.attention import packed_flash, packed_sdpa
from s2srm.models.flash import KERNELS, Needs

LENGTHS = (700, 1, 33, 64, 290)
SHAPES = {
    "gemma-2b": (8, 1, 256, None, None),
    "llama-2-7b": (8, 8, 128, None, None),
    "smollm2-135m": (9, 3, 64, None, None),
    "stories260k": (8, 4, 8, None, None),
    "window": (4, 2, 64, 100, None),
    "gemma-2": (4, 2, 256, 100, 2.0),
}
"""Query heads, key heads, head dimension, window, softcap."""


def inputs(name, device, dtype):
    heads, kv_heads, dim, window, softcap = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, h, sum(LENGTHS), dim) for h in (heads, kv_heads, kv_heads)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    cu_seqlens = torch.tensor([0, *LENGTHS], device=device).cumsum(0).to(torch.int32)
    arguments = {
        "attention_mask": None,
        "sliding_window": window,
        "softcap": softcap,
        "cu_seq_lens_q": cu_seqlens,
        "max_length_q": max(LENGTHS),
        "sequence_lengths": LENGTHS,
    }
    return [x.to(device).requires_grad_() for x in tensors], arguments


def outputs(function, tensors, arguments):
    """Attention's result and the gradients of queries, keys and values."""
    out, _ = function(nn.Module(), *tensors, **arguments)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad(out, tensors, upstream.to(out))]


def error(found, right):
    return float((found.detach().double() - right.detach()).norm() / right.detach().norm())


def functions(name, device):
    """packed_sdpa, and each kernel that says that it can; why the others cannot is printed."""
    yield "sdpa", packed_sdpa, True
    if device.type != "cuda":
        return
    capability = flash.capability_of(device)
    _, _, dim, window, softcap = SHAPES[name]
    needs = Needs(dim, softcap is not None, window is not None)
    for kernel in KERNELS:
        reason = flash.why_not(kernel, capability, needs)
        if reason:
            print(f"{kernel.package}: {reason}")
            continue
        yield (
            kernel.package,
            packed_flash(kernel),
            not flash.why_not_deterministic(kernel, capability, needs),
        )


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients(name, device):
    """Each within three times what bfloat16 loses under SDPA, softcap and window included."""
    exact, arguments = inputs(name, device, torch.float64)
    halves, _ = inputs(name, device, torch.bfloat16)
    with torch.no_grad():
        for a, b in zip(exact, halves, strict=True):
            a.copy_(b)
    right = outputs(packed_sdpa, exact, arguments)
    lost = [
        error(*pair) for pair in zip(outputs(packed_sdpa, halves, arguments), right, strict=True)
    ]
    for package, function, _ in functions(name, device):
        found = outputs(function, halves, arguments)
        errors = [error(*pair) for pair in zip(found, right, strict=True)]
        assert all(e <= 3 * limit + 1e-3 for e, limit in zip(errors, lost, strict=True)), (
            package,
            errors,
            lost,
        )


@pytest.mark.parametrize("name", SHAPES)
def test_two_calls_give_the_same_bits(name, device):
    tensors, arguments = inputs(name, device, torch.bfloat16)
    for package, function, deterministic in functions(name, device):
        if not deterministic:
            print(f"{package}: not deterministic here")
            continue
        first = outputs(function, tensors, arguments)
        for _ in range(3):
            again = outputs(function, tensors, arguments)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), package


def test_torch_has_a_kernel_on_every_gpu_from_ampere_on(device):
    """Its own FlashAttention needs no package: where this fails, its signature has changed."""
    if device.type == "cuda" and flash.capability_of(device)[0] >= 8:
        assert flash.why_not(flash.TORCH, flash.capability_of(device), Needs(window=True)) == ""
