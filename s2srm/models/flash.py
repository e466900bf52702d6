"""FlashAttention's varlen kernels: which are here, what each can do, and how each is called.

    3      flash-attn-3, Hopper's kernels
    2      flash-attn, from Ampere on
    4      flash-attn-4, Hopper and Blackwell
    torch  torch.nn.attention.varlen, version 2 built into torch, from Ampere on

The packages are called directly and every argument by its name. transformers' own wrappers leave
out a window or sinks that a package's signature does not have, take a kernel from the hub where a
package is missing, and leave gradients to the order of atomic additions unless an environment
variable is set. Two packages share the import name flash_attn, so that what is installed is read
from the packages' metadata.

What is refused here: other head dimensions than multiples of 8 up to 256, float32, and whatever
`Kernel.why_not` names. What a build lacks without saying so (a wheel for other GPUs, features
switched off when it was compiled) shows in the check at load, see `engine.build.check_model`.

Left out: attention sinks, dropout, KV caches, FP8, the kernels of the hub.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from s2srm.models.determinism import with_deterministic_backward

Capability = tuple[int, int]
"""Compute capability of a GPU: (9, 0) is Hopper."""


class Needs(NamedTuple):
    """What a model asks of its attention. head_dim: the larger of queries' and values'."""

    head_dim: int = 128
    softcap: bool = False
    window: bool = False


def needs_of(config: PretrainedConfig) -> Needs:
    """Read from a model's configuration; what it does not state shows in the check at load."""
    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "hidden_size", None)
    stated = [getattr(config, name, None) for name in ("head_dim", "qk_head_dim", "v_head_dim")]
    dims = [value for value in stated if isinstance(value, int) and value > 0]
    if not dims and isinstance(heads, int) and isinstance(size, int):
        dims = [size // heads]
    layers = getattr(config, "layer_types", None) or ()
    return Needs(
        max(dims, default=Needs().head_dim),
        softcap=bool(getattr(config, "attn_logit_softcapping", None)),
        window=bool(getattr(config, "sliding_window", None)) or "sliding_attention" in layers,
    )


def capability_of(device: torch.device) -> Capability:
    """Of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True)
class Kernel:
    """One implementation. `name` is what transformers is told as attn_implementation.

    It must not contain "flash", which makes transformers take its own wrapper's habits for granted.
    """

    name: str
    package: str
    """Distribution that brings it."""
    module: str
    function: str
    words: str
    why_not: Callable[[Capability, Needs], str]
    """Why these kernels cannot do it on such a GPU; empty if they can."""
    why_not_deterministic: Callable[[Capability, Needs], str]
    """The same of gradients that do not depend on the order of additions."""

    @property
    def version(self) -> str | None:
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


def _flash_3(capability: Capability, needs: Needs) -> str:
    return "" if capability[0] == 9 else f"its kernels are Hopper's, this GPU is {_sm(capability)}"


def _flash_3_deterministic(capability: Capability, needs: Needs) -> str:
    return "" if needs.head_dim <= 192 else f"not at head dimension {needs.head_dim}"


def _flash_2(capability: Capability, needs: Needs) -> str:
    return "" if capability[0] >= 8 else f"it needs an Ampere GPU or newer, not {_sm(capability)}"


def _flash_4(capability: Capability, needs: Needs) -> str:
    """Backward exists from 9.x on; on Blackwell, head dimension 256 has kernels of its own."""
    major = capability[0]
    if major < 9:
        return f"its backward needs a Hopper GPU or newer, not {_sm(capability)}"
    if major in (10, 11):
        if 128 < needs.head_dim != 256:
            return f"no head dimension {needs.head_dim} on {_sm(capability)}"
        if needs.head_dim == 256 and (needs.softcap or needs.window):
            return f"neither softcap nor window at head dimension 256 on {_sm(capability)}"
    if major == 12 and needs.softcap:
        return f"its backward has no softcap on {_sm(capability)}"
    return ""


def _flash_4_deterministic(capability: Capability, needs: Needs) -> str:
    return f"not on {_sm(capability)}" if capability[0] == 12 else ""


def _torch(capability: Capability, needs: Needs) -> str:
    if needs.softcap:
        return "it has no softcap"
    return _flash_2(capability, needs)


def _always(capability: Capability, needs: Needs) -> str:
    return ""


def _sm(capability: Capability) -> str:
    return "capability {}.{}".format(*capability)


FLASH_3 = Kernel(
    *("s2srm_fa3", "flash-attn-3", "flash_attn_interface", "flash_attn_varlen_func"),
    "the flash-attn-3 package, one call per batch",
    *(_flash_3, _flash_3_deterministic),
)
FLASH_2 = Kernel(
    *("s2srm_fa2", "flash-attn", "flash_attn", "flash_attn_varlen_func"),
    "the flash-attn package, one call per batch",
    *(_flash_2, _always),
)
FLASH_4 = Kernel(
    *("s2srm_fa4", "flash-attn-4", "flash_attn.cute", "flash_attn_varlen_func"),
    "the flash-attn-4 package, one call per batch",
    *(_flash_4, _flash_4_deterministic),
)
TORCH = Kernel(
    *("s2srm_varlen", "torch", "torch.nn.attention.varlen", "varlen_attn"),
    "the FlashAttention kernels inside torch, one call per batch",
    *(_torch, _always),
)
KERNELS = (FLASH_3, FLASH_2, FLASH_4, TORCH)


def preferred(capability: Capability) -> tuple[Kernel, ...]:
    """Kernels to try on such a GPU, the fastest first, those made for it before older ones.

    Consumer Blackwell (12.x) has none of data-centre Blackwell's (10.x) instructions: there
    version 4 runs Ampere's way and without deterministic gradients, after version 2.
    """
    return {
        9: (FLASH_3, FLASH_2, FLASH_4, TORCH),
        10: (FLASH_4, FLASH_2, TORCH, FLASH_3),
        11: (FLASH_4, FLASH_2, TORCH, FLASH_3),
    }.get(capability[0], (FLASH_2, FLASH_4, TORCH, FLASH_3))


def why_not(kernel: Kernel, capability: Capability, needs: Needs) -> str:
    """Why this kernel cannot be taken for such a model on such a GPU; empty if it can."""
    if kernel.version is None:
        return "not installed"
    if needs.head_dim % 8 or needs.head_dim > 256:
        return f"head dimension {needs.head_dim} is not a multiple of 8 up to 256"
    reason = kernel.why_not(capability, needs)
    if reason:
        return reason
    accepted, reason = _signature(kernel)
    if reason:
        return reason
    if needs.softcap and "softcap" not in accepted:
        return f"version {kernel.version} has no softcap"
    if (needs.window or kernel is TORCH) and "window_size" not in accepted:
        return f"version {kernel.version} has no window_size"
    return ""


def why_not_deterministic(kernel: Kernel, capability: Capability, needs: Needs) -> str:
    """Why the gradients of two equal calls may differ in rounding; empty if they do not."""
    if kernel is not TORCH and "deterministic" not in _signature(kernel)[0]:
        return f"version {kernel.version} has no such option"
    return kernel.why_not_deterministic(capability, needs)


@cache
def _signature(kernel: Kernel) -> tuple[frozenset[str], str]:
    """Names of the parameters of the kernel's function, or why it cannot be imported."""
    try:
        function = _function(kernel)
    except Exception as error:  # a wheel for another torch: undefined symbols, missing libraries
        text = " ".join(str(error).split())[:200]
        return frozenset(), f"cannot be imported: {type(error).__name__}: {text}"
    return frozenset(inspect.signature(function).parameters), ""


def _function(kernel: Kernel) -> Callable[..., Any]:
    return getattr(importlib.import_module(kernel.module), kernel.function)


def call(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Causal attention of each packed sequence by itself.

    Args:
        query: (T, H, d) bfloat16 or float16; key and value (T, H_kv, d), H a multiple of H_kv.
        cu_seqlens: (B+1,) int32.
        max_seqlen: longest sequence.
        scale: None is 1 / sqrt(d).
        window: tokens that a token sees, itself included.
        deterministic: gradients that do not depend on the order of additions.

    Returns (T, H, d). Raises TypeError where the function lacks an argument that is needed: no
    argument that changes the result is left out.
    """
    accepted = _signature(kernel)[0]
    arguments: dict[str, Any] = {} if softcap is None else {"softcap": softcap}
    if kernel is TORCH:
        names = ("cu_seq_q", "cu_seq_k", "max_q", "max_k")
        # Causal by the right side of its window: torch has no argument of that name.
        arguments |= {"scale": scale, "window_size": (window - 1 if window else -1, 0)}
        if query.shape[1] != key.shape[1] and "enable_gqa" in accepted:
            arguments["enable_gqa"] = True
        elif query.shape[1] != key.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    else:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        arguments |= {"softmax_scale": scale, "causal": True}
        if window:
            arguments["window_size"] = (window - 1, 0)
        if deterministic:
            arguments["deterministic"] = True
    lengths = zip(names, (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen), strict=True)
    # The first releases of version 4 find the longest sequence themselves.
    arguments |= {name: given for name, given in lengths if name in accepted}

    def attend() -> Tensor:
        found = _function(kernel)(query, key, value, **arguments)
        # Version 4 and the first releases of version 3 give the log-sum-exp too.
        return found[0] if isinstance(found, tuple) else found

    return with_deterministic_backward(attend) if deterministic and kernel is TORCH else attend()
