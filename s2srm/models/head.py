"""The LM head: the only place where hidden states meet the vocabulary.

The fused operation runs inside `forward` of the module that owns the weight, because DeepSpeed
ZeRO-3 gathers a parameter only while its owner runs. Logits exist only without `op`, which is what
`generate` and Hugging Face's own forward use; there the model itself applies softcap and scale.

Left out: heads with a projection of their own (a stack of layers instead of one matrix), which
are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from s2srm.errors import UserError
from s2srm_kernels import linear_cross_entropy, linear_logprobs, linear_ppo_loss, linear_token_stats

HeadOp = Literal["cross_entropy", "logprobs", "token_stats", "ppo_loss"]

OPS: dict[str, Callable[..., Any]] = {
    "cross_entropy": linear_cross_entropy,
    "logprobs": linear_logprobs,
    "token_stats": linear_token_stats,
    "ppo_loss": linear_ppo_loss,
}


class FusedHead(nn.Module):
    """logits = softcap(scale * (hidden @ weight.T) + bias), never written down.

    Takes over `weight` (V, D) and `bias` (V,) or None as the same Parameter objects, so that
    state-dict names and ties to the embedding stay as they are.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, *, softcap: float | None, scale: float) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, linear.weight)
        self.register_parameter("bias", getattr(linear, "bias", None))
        self.softcap = softcap
        self.scale = scale

    def forward(
        self,
        hidden: Tensor,
        target: Tensor | None = None,
        op: HeadOp | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the kernel `op` of s2srm_kernels gives for hidden (N, D) and target (N,).

        Keyword arguments go to the kernel. Without `op`: logits (..., V) before softcap and scale.
        """
        if op is None:
            return F.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        return OPS[op](hidden, self.weight, target, bias=self.bias, softcap=self.softcap, **kwargs)


def head_scale(config: PretrainedConfig) -> float:
    """The constant that an architecture multiplies its logits by (Granite, Cohere); 1 for most.

    A name that is not known here is found by the check at load.
    """
    if config.model_type == "mpt":
        return 1.0  # has a logit_scale, and transformers leaves it out
    if config.model_type == "hyperclovax":
        return float(config.logits_scaling)  # multiplied by it, where Granite divides
    for name in ("logits_scaling", "logits_mup_width_multiplier"):
        divisor = getattr(config, name, None)
        if divisor is not None:
            return 1.0 / float(divisor)
    for name in ("logit_scale", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        if factor is not None:
            return float(factor)
    return 1.0


def head_softcap(config: PretrainedConfig) -> float | None:
    """c of logits = c * tanh(logits / c) (Gemma, RecurrentGemma, xLSTM), or None."""
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        cap = getattr(config, name, None)
        if cap is not None:
            return float(cap)
    return None


def fuse_head(lm: nn.Module, config: PretrainedConfig, where: str) -> FusedHead:
    """Replace the model's output embedding by a FusedHead on the same parameters."""
    linear = lm.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    # A subclass may scale or normalise, which the check at load could not see: it runs this head.
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise UserError(
            f"{where}: {config.model_type} models are not supported: the LM head is a "
            f"{type(linear).__name__}, and only a single linear layer can be fused"
        )
    scale = head_scale(config)
    if scale != 1.0 and linear.bias is not None:
        raise UserError(f"{where}: scaled logits together with a head bias are not supported")
    head = FusedHead(linear, softcap=head_softcap(config), scale=scale)
    lm.set_output_embeddings(head)  # pyright: ignore[reportCallIssue]
    return head
