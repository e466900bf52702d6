"""Attention over packed sequences: FlashAttention's varlen kernels, or torch's SDPA per sequence.

Sequences lie end to end in a batch of one, and the model hands `cu_seq_lens_q` to its attention
function. `flash` takes the flash-attn package through transformers, else the FlashAttention that is
built into torch (`torch.nn.attention.varlen`). `sdpa` calls torch's scaled_dot_product_attention
for each sequence, so that neither work nor memory grows with the square of the packed length, as
they would with one block-diagonal mask. Sliding windows are honoured; attention softcaps (Gemma 2)
are computed in plain torch under `sdpa`, which transformers' own sdpa refuses.

Left out: attention sinks, masks of a model's own (sparse attention) and other extra inputs; a model
that passes them gets an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from s2srm import distributed
from s2srm.errors import UserError

logger = logging.getLogger(__name__)

SDPA = "s2srm_packed"
VARLEN = "s2srm_varlen"
MEANINGS = {
    SDPA: "torch's scaled_dot_product_attention, one call per sequence",
    VARLEN: "the FlashAttention kernels inside torch, one call per batch",
    "flash_attention_2": "the flash-attn package, one call per batch",
    "flash_attention_3": "the flash-attn-3 package, one call per batch",
}
"""What each name of an attention function means, in words."""
_HARMLESS = frozenset({"position_ids", "cu_seq_lens_k"})
"""Tensors that reach an attention function and change nothing there."""


def choose_attention(
    wanted: Literal["auto", "flash", "sdpa"], device: torch.device, dtype: torch.dtype
) -> str:
    """Name of the attention function for transformers' `attn_implementation`; logged once.

    UserError if `flash` is wanted where it cannot run.
    """
    reason = _why_no_flash(device, dtype)
    if wanted == "flash" and reason:
        raise UserError(f"attention: flash is not possible here: {reason}; take auto or sdpa")
    chosen = SDPA if wanted == "sdpa" or reason else _flash_implementation()
    _log_choice(wanted, chosen, reason if wanted == "auto" else "")
    return chosen


def _why_no_flash(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return f"FlashAttention needs a CUDA device, this one is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention needs bfloat16 weights, these are {dtype}"
    return ""


def _flash_implementation() -> str:
    if importlib.util.find_spec("flash_attn_interface") is not None:
        return "flash_attention_3"
    if importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2"
    return VARLEN


@cache
def _log_choice(wanted: str, chosen: str, reason: str) -> None:
    if distributed.is_main():
        because = f" ({reason})" if reason else ""
        logger.info("attention %s: %s%s", wanted, MEANINGS[chosen], because)


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
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


def _refuse_others(mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """UserError for what would change the attention and is not known here.

    Sinks and biases, and the keys that sparse attention selects, by a mask or by their indices:
    those select everything in sequences as short as the check's, which could not tell.
    """
    if mask is not None:
        raise UserError("a mask of the model's own is not supported by the packed attention")
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
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and length > 1,
        scale=scaling,
    )


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


@lru_cache(maxsize=64)
def _band(length: int, window: int, device: torch.device) -> Tensor:
    """(length, length) bool, True where the key may be seen: causal, at most window - 1 back."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def packed_varlen(
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
    """The FlashAttention varlen kernel that torch carries; shapes as `packed_sdpa`."""
    _refuse_others(attention_mask, kwargs)
    if softcap is not None:
        raise UserError(
            "torch's varlen attention has no softcap; install flash-attn or set attention: sdpa"
        )
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("varlen attention needs cu_seq_lens_q and max_length_q")
    for windows in _watched:
        windows.told.add(sliding_window or None)
    varlen = importlib.import_module("torch.nn.attention.varlen")
    out = varlen.varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None], None


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
AttentionInterface.register(VARLEN, packed_varlen)
AttentionMaskInterface.register(SDPA, _packed_mask)
AttentionMaskInterface.register(VARLEN, _packed_mask)
