"""Attention's backward alone runs under deterministic algorithms, on whatever thread."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from s2srm.models.determinism import with_deterministic_backward

SEEN: list[tuple[str, bool, bool]] = []


def note(where: str) -> None:
    enabled = torch.are_deterministic_algorithms_enabled()
    SEEN.append((where, enabled, torch.is_deterministic_algorithms_warn_only_enabled()))


@torch.library.custom_op("s2srm_tests::toy_varlen_attn", mutates_args={})
def toy(x: Tensor) -> Tensor:
    note("forward")
    return x * 2


@torch.library.custom_op("s2srm_tests::toy_varlen_attn_backward", mutates_args={})
def toy_backward(grad: Tensor) -> Tensor:
    note("backward")
    return grad * 2


toy.register_autograd(lambda ctx, grad: toy_backward(grad))


class After(torch.autograd.Function):
    """A node whose backward comes before and after the attention's."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        note("other")
        return grad


@pytest.fixture(autouse=True)
def switched_off():
    SEEN.clear()
    yield
    torch.use_deterministic_algorithms(False)


def test_only_the_attention_is_switched_on() -> None:
    x = torch.ones(3, requires_grad=True)
    out = After.apply(with_deterministic_backward(lambda: toy(After.apply(x))))
    assert not torch.are_deterministic_algorithms_enabled()
    out.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2.0] * 3
    assert SEEN == [
        ("forward", True, True),
        ("other", False, False),
        ("backward", True, False),
        ("other", False, False),
    ]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_that_is_deterministic_stays_so() -> None:
    torch.use_deterministic_algorithms(True)
    x = torch.ones(3, requires_grad=True)
    with_deterministic_backward(lambda: toy(x)).sum().backward()
    assert [enabled for _, enabled, _ in SEEN] == [True, True]
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_other_nodes_and_frozen_tensors_are_left_alone() -> None:
    x = torch.ones(3, requires_grad=True)
    (After.apply(with_deterministic_backward(lambda: x * 2))).sum().backward()
    assert SEEN == [("other", False, False)]
    assert with_deterministic_backward(lambda: toy(torch.ones(2))).grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_gives_a_node_that_is_known(dtype: torch.dtype) -> None:
    """The names are torch's own; a CPU's flash kernel has the same as a GPU's."""
    query = torch.randn(1, 2, 4, 8, dtype=dtype, requires_grad=True)
    attention = torch.nn.functional.scaled_dot_product_attention
    out = with_deterministic_backward(lambda: attention(query, query, query, is_causal=True))
    assert out.grad_fn is not None and "ScaledDotProductFlashAttention" in out.grad_fn.name()
    out.sum().backward()
    assert not torch.are_deterministic_algorithms_enabled()
