"""A scalar for every token: the critic of PPO, and the scalar reward model.

The language model's own head is kept, frozen and unused, so that a saved folder still loads as a
causal LM; the scalar head is saved beside it as score_head.safetensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from s2srm.errors import UserError
from s2srm.models.check import differences
from s2srm.models.float64 import sum_norm_gradients_in_float64
from s2srm.models.trunk import own_hidden, trunk_forward
from s2srm.packing import Packed

SCORE_FILE = "score_head.safetensors"


class ScoreHead(nn.Linear):
    """hidden @ weight.T + bias with products and sums in float32, or float64 in such a model.

    The parameters have the model's dtype, as ZeRO-3 demands of all that it partitions; the
    engines train them through float32 copies.
    """

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(input.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class PackedValueModel(nn.Module):
    """score(h_t) for the last hidden state h_t of every token t of a packed batch.

    init: "zero" (a fresh critic) or "normal", N(0, 1/(D+1)) with bias 0 (a fresh reward model;
    Huang et al., "The N implementation details of RLHF with PPO").
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        init: Literal["zero", "normal"] = "zero",
        seed: int = 0,
        where: str = "model",
    ) -> None:
        super().__init__()
        self.lm = lm
        self.where = where
        sum_norm_gradients_in_float64(lm)
        head = lm.get_output_embeddings()
        width = _hidden_width(lm, head)
        embedding = lm.get_input_embeddings()
        if head is not None and head.weight is not embedding.weight:
            head.requires_grad_(False)
        self.score = ScoreHead(width, 1, dtype=lm.dtype)
        weight = torch.zeros(1, width)
        if init == "normal":
            generator = torch.Generator().manual_seed(seed)
            weight = torch.randn(1, width, generator=generator) / (width + 1) ** 0.5
        with torch.no_grad():
            self.score.weight.copy_(weight)
            self.score.bias.zero_()

    @property
    def config(self) -> PretrainedConfig:
        """The Hugging Face configuration."""
        return self.lm.config

    def forward(self, batch: Packed, op: Literal["values", "check"] = "values") -> Tensor:
        """(T,) values, at least fp32: entry t is read after token t has been seen.

        op "check" instead compares the model's hidden states with Hugging Face's own, see check.py.
        """
        if op == "check":
            return self._check(batch)
        return self.score(trunk_forward(self.lm, batch))[:, 0]

    def _check(self, batch: Packed) -> Tensor:
        """See `check.differences`; hidden states are compared relative to the largest."""
        with torch.no_grad():
            scale = trunk_forward(self.lm, batch).abs().max().float()
            scale = scale.where(scale > 0, 1.0)

        return differences(
            self.lm,
            batch,
            lambda batch: trunk_forward(self.lm, batch) / scale,
            lambda tokens: own_hidden(self.lm, tokens) / scale,
        )

    def load_score(self, folder: str | Path) -> bool:
        """Take over the score head saved in a model folder; False if there is none there.

        Call it before an engine shards the parameters.
        """
        path = Path(folder) / SCORE_FILE
        if not path.is_file():
            return False
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.score.named_parameters():
                if name not in tensors or tensors[name].shape != parameter.shape:
                    raise UserError(
                        f"{path}: {name} must have shape {tuple(parameter.shape)}, found "
                        f"{tuple(tensors[name].shape) if name in tensors else 'none'}"
                    )
                parameter.copy_(tensors[name])
        return True

    def extra_files(self) -> dict[str, dict[str, Tensor]]:
        """File name -> tensors that are saved beside the language model."""
        return {SCORE_FILE: dict(self.score.named_parameters())}


def _hidden_width(lm: PreTrainedModel, head: nn.Module | None) -> int:
    """Of the states that the LM head reads: OPT-350m's are narrower than its layers."""
    width = getattr(head, "in_features", None)
    return int(lm.config.get_text_config().hidden_size if width is None else width)
