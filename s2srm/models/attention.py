"""Attention over packed sequences: a FlashAttention kernel, or torch's SDPA per sequence.

Sequences lie end to end in a batch of one, and the model hands `cu_seq_lens_q` to its attention
function, one of those registered here; choice.py says which. `packed_sdpa` calls torch's
scaled_dot_product_attention for each sequence, so that neither work nor memory grows with the
square of the packed length, as they would with one block-diagonal mask. `packed_flash` calls a
kernel of flash.py once. Both honour sliding windows and attention softcaps (Gemma 2), which SDPA
has not and plain torch computes, or raise. Gradients are deterministic where a kernel can.

Left out: attention sinks, masks of a model's own (sparse attention) and other extra inputs; a model
that passes them gets an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from s2srm.errors import UserError
from s2srm.models import flash
from s2srm.models.determinism import with_deterministic_backward
from s2srm.models.flash import Kernel, Needs

SDPA = "s2srm_packed"
MEANINGS = {
    SDPA: "torch's scaled_dot_product_attention, one call per sequence",
    **{kernel.name: kernel.words for kernel in flash.KERNELS},
}
"""What each name of a packed attention function means, in words."""
_HARMLESS = frozenset({"position_ids", "cu_seq_lens_k"})
"""Tensors that reach an attention function and change nothing there."""
HALVES = (torch.bfloat16, torch.float16)


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sequence_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each packed sequence by itself.

    query (1, H, T, d), key and value (1, H_kv, T, d); cu_seq_lens_q (B+1,) int32, and the same as
    lengths on the host. Returns (1, T, H, d). With a 4-d mask instead of packed lengths (generate),
    it is plain masked attention.
    """
    _refuse_others(attention_mask if cu_seq_lens_q is not None else None, kwargs)
    for windows in _watched:
        windows.told.add(sliding_window or None)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if sequence_lengths is None and cu_seq_lens_q is not None:
        sequence_lengths = tuple(cu_seq_lens_q.diff().tolist())
    if sequence_lengths is None:
        out = _attend(query, key, value, attention_mask, scaling, sliding_window, softcap)
        return out.transpose(1, 2).contiguous(), None
    pieces = [x.split(sequence_lengths, dim=2) for x in (query, key, value)]
    outs = [
        _attend(q, k, v, None, scaling, sliding_window, softcap)
        for q, k, v in zip(*pieces, strict=True)
    ]
    # In this order contiguous by one copy, as a kernel leaves its output.
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1), None


def _refuse_others(mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """UserError for what would change the attention and is not known here.

    Sinks and biases, and the keys that sparse attention selects, by a mask or by their indices:
    those select everything in sequences as short as the check's, which could not tell.
    """
    if mask is not None:
        raise UserError("a mask of the model's own is not supported by the packed attention")
    if kwargs.get("is_causal") is False:
        raise UserError("attention to later tokens is not supported by the packed attention")
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and name not in _HARMLESS:
            what = "attention sinks are" if name == "s_aux" else f"{name} is"
            raise UserError(f"{what} not supported by the packed attention")


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    length, kv_length = query.shape[2], key.shape[2]
    if mask is None:
        assert length in (1, kv_length), "a cache needs an attention mask"
        # Qwen2-MoE says 0 for no window.
        if window and kv_length > window:
            mask = _band(kv_length, window, query.device)[-length:]
    if softcap is not None:
        return _softcapped(query, key, value, mask, scaling, softcap)

    def attend() -> Tensor:
        is_causal = mask is None and length > 1
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=scaling
        )

    trained = query.is_cuda and query.requires_grad
    return with_deterministic_backward(attend) if trained else attend()


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    length, kv_length = query.shape[2], key.shape[2]
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[3] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = _band(kv_length, kv_length, query.device)[-length:]
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    return scores.softmax(-1, dtype=scores.dtype) @ value


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """(length, length) bool, True where the key may be seen: causal, at most window - 1 back."""
    # The corner of a longer one is the same: few are kept, whatever the lengths are.
    return _whole_band(1 << (length - 1).bit_length(), window, device)[:length, :length]


@lru_cache(maxsize=4)
def _whole_band(length: int, window: int, device: torch.device) -> Tensor:
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def packed_flash(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    """The attention function of a FlashAttention kernel; arguments and result as `packed_sdpa`.

    What has no packed lengths (generate) is plain masked attention there.
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        local: dict[str, Any] = {"scaling": scaling, "sliding_window": sliding_window}
        if cu_seq_lens_q is None:
            local["softcap"] = softcap
            return packed_sdpa(module, query, key, value, attention_mask, **local, **kwargs)
        if max_length_q is None:
            raise ValueError("varlen attention needs max_length_q beside cu_seq_lens_q")
        _refuse_others(attention_mask, kwargs)
        needs = Needs(
            max(query.shape[3], value.shape[3]), softcap is not None, bool(sliding_window)
        )
        deterministic = _check_kernel(kernel, query.device, query.dtype, needs)
        for windows in _watched:
            windows.told.add(sliding_window or None)
        width = value.shape[3]
        if width < query.shape[3]:  # the kernels take one size of heads
            value = F.pad(value, (0, query.shape[3] - width))
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = flash.call(
            kernel,
            q,
            k,
            v,
            cu_seq_lens_q,
            max_length_q,
            scale=scaling,
            window=sliding_window or None,
            softcap=softcap,
            deterministic=deterministic and query.requires_grad,
        )
        return out[None, ..., :width], None

    return attention


@cache
def _check_kernel(kernel: Kernel, device: torch.device, dtype: torch.dtype, needs: Needs) -> bool:
    """Whether its gradients are deterministic; UserError if it cannot do what the model asks."""
    if dtype not in HALVES:
        raise UserError(f"{kernel.words}: takes bfloat16, the model's queries are {dtype}")
    capability = flash.capability_of(device)
    reason = flash.why_not(kernel, capability, needs)
    if reason:
        raise UserError(f"{kernel.words}: {reason}")
    return not flash.why_not_deterministic(kernel, capability, needs)


class Windows:
    """What local attention the masks of a forward were asked for, and attention was told of.

    An architecture may limit attention by its mask alone (chunks, or a window that it does not
    pass on); the packed functions get no mask, and would see everything.
    """

    def __init__(self) -> None:
        self.asked: set[int | None] = set()
        self.told: set[int | None] = set()

    @property
    def unknown(self) -> set[int | None]:
        """Windows that one of the two has and the other has not."""
        if not self.asked or not self.told:
            return set()
        return (self.asked - {None} - self.told) | (self.told - {None} - self.asked)


_watched: list[Windows] = []


@contextmanager
def watch_windows() -> Iterator[Windows]:
    """Inside, packed forwards note their windows in what is yielded."""
    _watched.append(Windows())
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


def _packed_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """No mask for a packed batch; transformers' own where there is padding (generate)."""
    if attention_mask is None:
        for windows in _watched:
            windows.asked.add(local_size or None)
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **kwargs)


AttentionInterface.register(SDPA, packed_sdpa)
AttentionMaskInterface.register(SDPA, _packed_mask)
for _kernel in flash.KERNELS:
    AttentionInterface.register(_kernel.name, packed_flash(_kernel))
    AttentionMaskInterface.register(_kernel.name, _packed_mask)
