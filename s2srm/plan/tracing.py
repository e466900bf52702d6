"""The bytes that code allocates, counted on the meta device: the real modules, without their data.

A storage counts from the operator that returns it until it is freed, so the peak is that of the
code as it is, whatever the architecture. Two things that meta tensors do differently are mended:
attention takes the fused kernel that real devices take, and a number that is read off a tensor is 0
(transformers asks a mask so whether a batch is packed, and 0 is how ours answers).

Left out: what an operator allocates and frees within itself (workspaces.py has the LM head's), and
the rounding of an allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from s2srm.models import flash


class AllocationTrace(TorchDispatchMode):
    """Inside, `now` and `peak` are the bytes of storages made since, without those of `outside`.

    left_out: sizes in bytes that do not count. A tensor as large as the vocabulary would decide
    where a model of two layers has its peak; it is added where its time in a deep one is known.
    """

    def __init__(self, outside: nn.Module, left_out: Collection[int] = ()) -> None:
        super().__init__()
        self.left_out = left_out
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._fused = FusedAttention()
        for tensor in (*outside.parameters(), *outside.buffers()):
            # Views of a weight are no memory of their own.
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def __enter__(self) -> AllocationTrace:
        self._fused.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._fused.__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def restart_peak(self) -> None:
        """Look for the peak from here on."""
        self.peak = self.now

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self._sizes or size in self.left_out:
            return
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class FusedAttention:
    """Inside, attention of meta tensors keeps what the fused kernels keep: query, key, value,
    output and one log-sum-exp per query, never the scores.

    Without it torch takes its unfused formula for the meta device, and the packed function of
    FlashAttention asks which GPU a meta tensor is on. The kernel's schema is the
    CPU's; the CUDA kernels keep the same tensors. A TorchFunctionMode would be off inside
    backward(), where activation checkpointing runs the forward again.
    """

    def __enter__(self) -> None:
        self._own = own = F.scaled_dot_product_attention

        def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return (_fused if query.is_meta else own)(query, *args, **kwargs)

        F.scaled_dot_product_attention = attend
        ALL_ATTENTION_FUNCTIONS[flash.TORCH.name] = _varlen

    def __exit__(self, *exception: Any) -> None:
        F.scaled_dot_product_attention = self._own
        del ALL_ATTENTION_FUNCTIONS[flash.TORCH.name]


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """models.attention.packed_flash for heads of one size; windows and softcaps cost no memory."""
    assert cu_seq_lens_q is not None
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    # Without its lse it is one tensor.
    out: Tensor = varlen_attn(  # pyright: ignore[reportAssignmentType]
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=True,
    )
    return out[None], None
