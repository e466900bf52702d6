"""A Hugging Face causal LM that takes packed batches and meets its head only at response rows."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from s2srm.models.check import differences
from s2srm.models.float64 import sum_norm_gradients_in_float64
from s2srm.models.head import FusedHead, HeadOp, fuse_head
from s2srm.models.trunk import trunk_forward
from s2srm.packing import Packed


class PackedCausalLM(nn.Module):
    """`lm` with its head replaced by a `FusedHead`.

    The state dict is that of `lm` under the prefix "lm.".
    """

    def __init__(self, lm: PreTrainedModel, where: str = "model") -> None:
        super().__init__()
        self.lm = lm
        self.where = where
        fuse_head(lm, lm.config, where)
        sum_norm_gradients_in_float64(lm)

    @property
    def config(self) -> PretrainedConfig:
        """The Hugging Face configuration."""
        return self.lm.config

    @property
    def head(self) -> FusedHead:
        """The LM head. Call it only from within `forward`: ZeRO-3 gathers its weight there."""
        head = self.lm.get_output_embeddings()
        assert isinstance(head, FusedHead)
        return head

    def hidden_states(self, batch: Packed) -> Tensor:
        """(T, D): last hidden state of every token, after the final norm."""
        return trunk_forward(self.lm, batch)

    def forward(
        self,
        batch: Packed,
        op: HeadOp | Literal["hidden", "check"] = "cross_entropy",
        hidden: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the kernel `op` gives for the rows and targets of the batch.

        op: cross_entropy, logprobs, token_stats or ppo_loss; keyword arguments go to the kernel
        of that name (`linear_...`), tensors among them with one entry per row of the batch.
        "hidden" gives what the head would read, (N, D), one for each row; handed in as `hidden`
        later, it spares that forward of the trunk.
        "check" instead compares the model with Hugging Face's own, see check.py.
        """
        if op == "check":
            return self._check(batch)
        if hidden is None:
            hidden = self.hidden_states(batch)[batch.rows]
        if op == "hidden":
            return hidden
        return self.head(hidden, batch.targets, op=op, **kwargs)

    def _check(self, batch: Packed) -> Tensor:
        """See `check.differences`: logprobs of every next token against Hugging Face's logits."""

        def packed(batch: Packed) -> Tensor:
            hidden = self.hidden_states(batch)[batch.rows]
            return self.head(hidden, batch.targets, op="logprobs", with_entropy=False).logprobs

        def own(tokens: Tensor) -> Tensor:
            logits = self.lm(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            return -F.cross_entropy(_at_least_float(logits), tokens[1:], reduction="none")

        return differences(self.lm, batch, packed, own)


def _at_least_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
