"""Gradients of torch's own attention kernels that do not depend on the order of additions.

Their backward adds into the gradient of the queries in whatever order the blocks finish, unless
`torch.use_deterministic_algorithms` is on. Switched on for a whole run it also forbids operations
that have no deterministic form, so it is switched on here around attention alone: in the forward,
which chooses a kernel that can be deterministic, and around that one node of the backward.

Left out: attention whose head dimension torch pads (no multiple of 8), where the node that is
found is the slice after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_NODES = ("ScaledDotProductFlashAttention", "ScaledDotProductEfficientAttention", "varlen_attn")
"""In the names of the nodes that obey the switch. Matrix products would raise under it."""


def with_deterministic_backward(function: Callable[[], Tensor]) -> Tensor:
    """function(), one attention call of torch's, with deterministic kernels in its backward."""
    with _choosing_deterministic():
        out = function()
    node = out.grad_fn
    if node is None or not any(name in node.name() for name in _NODES):
        return out
    if not torch.are_deterministic_algorithms_enabled():
        # The engine calls both in the thread of the node, right before and right after it.
        node.register_prehook(_switch_on)
        node.register_hook(_switch_off)
    return out


def _switch_on(grads: object) -> None:
    torch.use_deterministic_algorithms(True)


def _switch_off(grads_in: object, grads_out: object) -> None:
    torch.use_deterministic_algorithms(False)


@contextmanager
def _choosing_deterministic() -> Iterator[None]:
    """Inside, SDPA takes no kernel that cannot be deterministic (cuDNN's); nothing raises."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only or not before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
