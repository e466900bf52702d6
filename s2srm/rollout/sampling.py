"""Which token is next: a draw from softmax(logits / temperature) with a seed for each sequence.

Inverse CDF on a tree. The tokens' probabilities are added up in groups of FAN_OUT, these sums
again, and a draw goes down from the root: at every level one uniform number chooses among at most
FAN_OUT children in proportion to their sums. That takes 1 to 4 random numbers a token, where Gumbel
noise takes one for each token of the vocabulary.

The uniform numbers come from the sequence's seed alone, so a response does not change with the
batch that it is in. Its logits do, by rounding (about 1e-6). In a plain CDF over a vocabulary this
moves the bounds of all tokens that follow by more than the narrow ones are wide; on the tree a draw
changes only if one of its few numbers lies that near to a bound among FAN_OUT.

Left out: top-p, top-k and every other warper, because the logprobs of PPO would then not be those
sampled from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor

from s2srm.watchdog import pulse

FAN_OUT = 32


class SeededSampling(LogitsProcessor):
    """Logits of the next token -> 0 at the drawn token and -inf elsewhere, for a greedy decoder.

    Call number t draws token t of every sequence. At temperature 0 the logits stay as they are.
    Suppressed ids are never drawn.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        temperature: float,
        max_new_tokens: int,
        suppress: Sequence[int],
        device: torch.device,
    ) -> None:
        self.seeds = list(seeds)
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.suppress = list(suppress)
        self.device = device
        self._uniforms: Tensor | None = None
        self._step = 0

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch alone."""
        if self._uniforms is not None:
            self._uniforms = self._uniforms[rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits of the next token -> (B, V) float32."""
        pulse.beat()
        scores = scores.float()
        if self.suppress:
            scores = scores.clone()
            scores[:, self.suppress] = -torch.inf
        if self.temperature == 0:
            return scores
        if self._uniforms is None:
            self._uniforms = self._draw(num_levels(scores.shape[1]))
        weights = scores - scores.amax(dim=-1, keepdim=True)
        weights = weights.div_(self.temperature).exp_()
        chosen = choose(weights, self._uniforms[:, self._step])
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def _draw(self, levels: int) -> Tensor:
        """(B, max_new_tokens, levels) float64, the same on every device."""
        shape = (self.max_new_tokens, levels)
        rows = [
            torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in self.seeds
        ]
        return torch.stack(rows).to(self.device)


def num_levels(size: int) -> int:
    """Uniform numbers that `choose` takes for a draw among `size` tokens."""
    levels = 1
    while size > FAN_OUT:
        size = -(-size // FAN_OUT)
        levels += 1
    return levels


def choose(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw from every row in proportion to its weights.

    Args:
        weights: (B, V) float32, none negative, some positive in every row.
        uniforms: (B, num_levels(V)) float64 in [0, 1), first that of the root.

    Returns:
        (B,) int64. A token of weight 0 is never drawn.
    """
    levels = [weights]
    while levels[-1].shape[1] > FAN_OUT:
        below = levels[-1]
        missing = -below.shape[1] % FAN_OUT
        levels[-1] = grouped = F.pad(below, (0, missing)) if missing else below
        levels.append(grouped.unflatten(1, (-1, FAN_OUT)).sum(-1))
    rows = torch.arange(len(weights), device=weights.device)
    children, chosen = levels[-1], torch.zeros_like(rows)
    for depth in range(len(levels)):
        if depth > 0:
            children = levels[-1 - depth].unflatten(1, (-1, FAN_OUT))[rows, chosen]
        bounds = children.double().cumsum(-1)
        place = uniforms[:, depth, None] * bounds[:, -1:]
        chosen = chosen * FAN_OUT + (bounds <= place).sum(-1)
    return chosen
