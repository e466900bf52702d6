"""Stand-ins for FlashAttention: packages with metadata and the real ones' signatures.

Each computes the right answer from nothing but the arguments that it is given, in float64 with one
dense mask, so that whatever a caller leaves out shows in outputs and gradients; and records them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from s2srm.models import attention, flash
from s2srm.models.flash import FLASH_2, FLASH_3, FLASH_4, Kernel

SIGNATURES = {
    FLASH_2: "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, "
    "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False, block_table=None",
    FLASH_3: "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, "
    "seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, "
    "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, "
    "pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False",
    FLASH_4: "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, "
    "max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, page_table=None, "
    "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, "
    "num_splits=1, pack_gqa=None, deterministic=False, return_lse=False",
}
"""Of flash-attn 2.8.3, flash-attn-3 3.0.0, flash-attn-4 (the part that comes before score_mod)."""
EARLY_4 = (
    "q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, "
    "page_table=None, softmax_scale=None, causal=False, window_size=(None, None), "
    "learnable_sink=None, softcap=0.0, pack_gqa=None"
)
"""Of flash-attn-4 as it came beside flash-attn 2.8.3: no longest sequence, no determinism."""
TORCH_SIGNATURE = (
    "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, "
    "window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None"
)


class Installer:
    """Installs stand-ins for one test, and says which GPU there is. `calls`: their arguments."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.calls: list[dict[str, Any]] = []

    def gpu(self, major: int, minor: int = 0) -> None:
        """Attention on the CPU then believes that it runs on such a GPU."""
        self.monkeypatch.setattr(flash, "capability_of", lambda device: (major, minor))
        clear()

    def install(self, kernel: Kernel, version: str, signature: str | None = None) -> None:
        """The distribution's metadata, and its function in the module that the kernel names."""
        folder = self.folder / f"{kernel.package.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {kernel.package}\nVersion: {version}\n"
        )
        if signature != "broken":
            function = self._function(kernel, signature or SIGNATURES[kernel])
            self._module(kernel.module, flash_attn_varlen_func=function)
        clear()

    def install_torch(self, signature: str = TORCH_SIGNATURE) -> None:
        """In the place of torch.nn.attention.varlen.varlen_attn, which needs a GPU."""
        function = self._function(flash.TORCH, signature)
        self.monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
        clear()

    def _module(self, name: str, **content: object) -> None:
        for parent in (name.partition(".")[0], name):
            module = sys.modules.get(parent) or ModuleType(parent)
            self.monkeypatch.setitem(sys.modules, parent, module)
        for key, value in content.items():
            setattr(sys.modules[name], key, value)

    def _function(self, kernel: Kernel, signature: str) -> Any:
        scope: dict[str, Any] = {"answer": self._answer, "kernel": kernel}
        exec(f"def function({signature}):\n    return answer(kernel, locals())", scope)
        return scope["function"]

    def _answer(self, kernel: Kernel, given: dict[str, Any]) -> Any:
        self.calls.append({"kernel": kernel, **given})
        q, k, v = (given[n] for n in (("query", "key", "value") if "query" in given else "qkv"))
        if q.shape[1] != k.shape[1]:
            assert given.get("enable_gqa", True), "queries and keys have other numbers of heads"
        cu_seqlens = given.get("cu_seq_q", given.get("cu_seqlens_q"))
        left, right = given["window_size"]
        if given.get("causal"):
            right = 0
        out = dense(
            *(q, k, v, cu_seqlens),
            scale=given.get("scale", given.get("softmax_scale")),
            left=None if left in (None, -1) else left,
            right=None if right in (None, -1) else right,
            softcap=given.get("softcap") or 0.0,
        )
        return (out, None) if kernel is FLASH_4 else out


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None,
    left: int | None,
    right: int | None,
    softcap: float,
) -> Tensor:
    """(T, H, d) attention of packed (T, H, d) and (T, H_kv, d), in float64."""
    assert cu_seqlens.dtype == torch.int32
    total = int(cu_seqlens[-1])
    owner = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff().long())
    ahead = torch.arange(total) - torch.arange(total)[:, None]
    mask = owner[:, None] == owner
    if right is not None:
        mask &= ahead <= right
    if left is not None:
        mask &= -ahead <= left
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * (scale or q.shape[2] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    return out.transpose(0, 1).to(torch.bfloat16)


def clear() -> None:
    """What was found about kernels is remembered for a process."""
    flash._signature.cache_clear()
    attention._check_kernel.cache_clear()
