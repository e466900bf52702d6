"""Inputs of one measurement, the same tensors for every provider.

Normal inputs: hidden ~ N(0, 1) and weight ~ N(0, 1/D), so logits ~ N(0, 1): a near-uniform softmax,
the worst case for skipping. Hidden states of a real model come from `benchmarks.hidden_states`.
Ignored rows are prompts: contiguous runs at the start of each sequence, as in a PPO batch.

Upstream gradients are random: all-ones would hide a wrong dW.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import SequenceShape, Shape

IGNORE_INDEX = -100
# No temporary of the float64 oracle has more elements.
CHUNK_ELEMENTS = 2**26
_SEQUENCE_ROWS = 512
# Log-ratios of PPO stay this far from both ends of the clip range: which term binds there would be
# decided by rounding, for every provider differently.
_CLIP_MARGIN = 0.05


@dataclass
class Problem:
    """One call of a vocabulary operation. `inputs` may require gradients; the rest is constant."""

    shape: Shape
    hidden: Tensor
    weight: Tensor
    target: Tensor
    seed: int
    kind: str = "normal"
    bias: Tensor | None = None
    row_weight: Tensor | None = None
    softcap: float | None = None
    temperature: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    clip: float = 0.2
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    _upstream: dict[str, Tensor] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors that a gradient can reach."""
        present = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in present.items() if tensor is not None}

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @cached_property
    def live(self) -> Tensor:
        """(R,) rows whose target is not ignored."""
        return (self.target != IGNORE_INDEX).nonzero().squeeze(1)

    @property
    def num_live(self) -> int:
        return self.live.shape[0]

    @cached_property
    def safe_target(self) -> Tensor:
        """(N,) targets with 0 in ignored rows, for providers that know no ignore_index."""
        return self.target.clamp_min(0)

    @cached_property
    def live_mask(self) -> Tensor:
        """(N,) float32, 0 in ignored rows."""
        return (self.target != IGNORE_INDEX).float()

    @cached_property
    def advantages(self) -> Tensor:
        """(N,) float32 of both signs."""
        return self._normal(1)

    @cached_property
    def old_logprobs(self) -> Tensor:
        """(N,) float32: the policy's less a log-ratio that is away from the ends of the clip."""
        log_ratio = 0.3 * self._normal(2)
        for end in (1 - self.clip, 1 + self.clip):
            offset = log_ratio - torch.tensor(end).log().to(log_ratio)
            close = offset.abs() < _CLIP_MARGIN
            log_ratio = torch.where(close, log_ratio - offset + _CLIP_MARGIN, log_ratio)
        return self._policy_logprobs - log_ratio

    @cached_property
    def ref_logprobs(self) -> Tensor:
        """(N,) float32: those of a reference policy."""
        return self._policy_logprobs + 0.2 * self._normal(3)

    def chunks(self) -> tuple[Tensor, ...]:
        """The live rows in pieces whose logits have at most CHUNK_ELEMENTS elements."""
        return self.live.split(max(1, CHUNK_ELEMENTS // self.shape.vocab_size))

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(n, V) logits: the product in the inputs' dtype, the rest in float32 at least."""
        z = F.linear(hidden, weight, bias)
        z = z if z.dtype == torch.float64 else z.float()
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z if self.temperature == 1.0 else z / self.temperature

    @cached_property
    def _policy_logprobs(self) -> Tensor:
        with torch.no_grad():
            weight = self.weight.double()
            bias = None if self.bias is None else self.bias.double()
            logprobs = [
                -F.cross_entropy(
                    self.logits(self.hidden[rows].double(), weight, bias),
                    self.target[rows],
                    reduction="none",
                )
                for rows in self.chunks()
            ]
        return self.scatter(torch.cat(logprobs).float())

    def upstream(self, name: str) -> Tensor:
        """Random upstream gradient of an output: 0-d for `loss`, else (N,); the same every time."""
        if name not in self._upstream:
            # Not hash(): it differs from process to process.
            stream = 1000 + sum(map(ord, name))
            scalar = name == "loss"
            values = self._normal(stream, () if scalar else (self.shape.num_rows,))
            self._upstream[name] = values.abs() + 0.5 if scalar else values
        return self._upstream[name]

    def scatter(self, values: Tensor) -> Tensor:
        """(R,) -> (N,), zeros in ignored rows."""
        full = values.new_zeros((self.shape.num_rows, *values.shape[1:]))
        return full.index_copy_(0, self.live, values)

    def _normal(self, stream: int, size: tuple[int, ...] | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 7919 + stream)
        size = (self.shape.num_rows,) if size is None else size
        return torch.randn(size, generator=generator).to(self.device)


def normal_problem(
    shape: Shape, dtype: torch.dtype, device: torch.device, ignored: float = 0.0, seed: int = 0
) -> Problem:
    """Random inputs that require gradients; `ignored` is the fraction of prompt rows."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    hidden = normal(shape.num_rows, shape.hidden_size).to(dtype)
    weight = (normal(shape.vocab_size, shape.hidden_size) * shape.hidden_size**-0.5).to(dtype)
    target = torch.randint(shape.vocab_size, (shape.num_rows,), generator=generator, device=device)
    target[prompt_rows(shape.num_rows, ignored, seed).to(device)] = IGNORE_INDEX
    return Problem(shape, hidden.requires_grad_(), weight.requires_grad_(), target, seed)


def prompt_rows(num_rows: int, ignored: float, seed: int) -> Tensor:
    """(N,) bool: the first rows of every sequence, `ignored` of all rows as near as that goes.

    The share differs from sequence to sequence. ValueError unless 0 <= ignored < 1.
    """
    if not 0 <= ignored < 1:
        raise ValueError(f"ignored must be in [0, 1), got {ignored}")
    generator = torch.Generator().manual_seed(seed)
    # At least four sequences, in pairs: one has as much more as the other has less.
    length = max(1, min(_SEQUENCE_ROWS, num_rows // 4))
    starts = range(0, num_rows, length)
    shares = torch.rand(len(starts), generator=generator) * min(ignored, 1 - ignored)
    shares[1::2] = -shares[: len(starts) // 2 * 2 : 2]
    if len(starts) % 2:
        shares[-1] = 0
    mask = torch.zeros(num_rows, dtype=torch.bool)
    for start, share in zip(starts, (ignored + shares).tolist(), strict=True):
        mask[start : start + round(share * min(length, num_rows - start))] = True
    return mask


@dataclass
class SequenceProblem:
    """Packed sequences for gae and token_rewards, with an argmax that agrees in 90% of tokens."""

    shape: SequenceShape
    rewards: Tensor
    values: Tensor
    response: Tensor
    argmax: Tensor
    cu_seqlens: Tensor

    @property
    def device(self) -> torch.device:
        return self.rewards.device


def sequence_problem(shape: SequenceShape, device: torch.device, seed: int = 0) -> SequenceProblem:
    """float32 rewards and values, int64 tokens, int32 cu_seqlens; lengths differ by sequence."""
    generator = torch.Generator().manual_seed(seed)
    n = shape.num_rows
    mean_length = n / shape.num_sequences
    bounds = torch.arange(shape.num_sequences + 1, dtype=torch.float64) * mean_length
    jitter = torch.rand(bounds.shape, generator=generator, dtype=torch.float64) - 0.5
    bounds[1:-1] += 0.8 * mean_length * jitter[1:-1]
    bounds = bounds.round().long()
    rewards, values = torch.randn(2, n, generator=generator).to(device)
    response = torch.randint(32000, (n,), generator=generator)
    other = torch.rand(n, generator=generator) < 0.1
    argmax = torch.where(other, (response + 1) % 32000, response)
    return SequenceProblem(
        *(shape, rewards, values, response.to(device), argmax.to(device)),
        bounds.to(torch.int32).to(device),
    )
