"""A Hugging Face causal LM that takes packed batches and meets its head only at response rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from s2srm.errors import UserError
from s2srm.models.float64 import sum_norm_gradients_in_float64
from s2srm.models.head import FusedHead, HeadOp, fuse_head
from s2srm.packing import Packed, Segment, pack


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

    def forward(self, batch: Packed, op: HeadOp | str = "cross_entropy", **kwargs: Any) -> Any:
        """What the kernel `op` gives for the rows and targets of the batch.

        op: cross_entropy, logprobs, token_stats or ppo_loss; keyword arguments go to the kernel
        of that name (`linear_...`), tensors among them with one entry per row of the batch.
        "check" instead compares with Hugging Face's own logits, see `check`.
        """
        if op == "check":
            return self._check(batch)
        hidden = self.hidden_states(batch)[batch.rows]
        return self.head(hidden, batch.targets, op=op, **kwargs)

    def _check(self, batch: Packed) -> Tensor:
        """(2,): worst difference of logprobs to Hugging Face's logits, and packed to unpacked.

        batch holds two sequences with the same tokens.
        """
        length = int(batch.cu_seqlens[1])
        alone = pack([Segment(batch.tokens[:length].tolist(), 1)]).to(batch.tokens.device)
        logits = self.lm(**_packed_inputs(alone)).logits[0].float()
        rows = batch.rows[batch.rows < length]
        wanted = logits[rows].log_softmax(-1)
        wanted = wanted.gather(1, batch.targets[: rows.numel(), None])[:, 0]
        hidden = self.hidden_states(batch)[batch.rows]
        found = self.head(hidden, batch.targets, op="logprobs", with_entropy=False).logprobs.float()
        first, second = found[: rows.numel()], found[rows.numel() :]
        return torch.stack([(first - wanted).abs().max(), (first - second).abs().max()])


def trunk_forward(lm: PreTrainedModel, batch: Packed) -> Tensor:
    """(T, D) last hidden states of the decoder stack over a packed batch."""
    return lm.base_model(**_packed_inputs(batch)).last_hidden_state[0]


def _packed_inputs(batch: Packed) -> dict[str, Any]:
    """A batch of one row for transformers, with what the attention functions need beside it."""
    lengths = tuple(batch.cu_seqlens.diff().tolist())
    return {
        "input_ids": batch.tokens[None],
        "position_ids": batch.positions[None],
        "use_cache": False,
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "sequence_lengths": lengths,
    }


def check_batch(vocab_size: int) -> Packed:
    """Two equal short sequences, for `PackedCausalLM.forward(batch, "check")`."""
    tokens = [(7 * i + 3) % vocab_size for i in range(5)]
    return pack([Segment(tokens, 1), Segment(tokens, 1)])


def judge_check(differences: Tensor, where: str, tolerance: float) -> None:
    """UserError if an architecture's logits or its packed forward are not what they should be."""
    names = (
        "logprobs differ from the Hugging Face model's own",
        "a packed forward differs from an unpacked one",
    )
    for name, difference in zip(names, differences.tolist(), strict=True):
        if not difference <= tolerance:
            raise UserError(
                f"{where}: this architecture is not supported: {name} by {difference:.2g} nat"
            )
