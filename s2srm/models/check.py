"""What a model must pass before it is trained or scored with: packed, it is Hugging Face's own.

Sequences of random tokens and unequal lengths go through the model packed, and one at a time
through its own forward with its own attention. Logprobs or hidden states must agree, and so must
the gradients with respect to the input embeddings, which every layer takes part in. The model's own
forward must be causal. Windows cannot be seen with sequences this short, so what the masks were
asked for is compared with what the attention functions were told.

Left out: gradients of the parameters, which would take a model's worth of memory at load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from s2srm.models.attention import watch_windows
from s2srm.models.positions import position_limit
from s2srm.models.trunk import takes_packed, with_own_attention
from s2srm.packing import Packed, Segment, pack

# The first is not the longest, and no two are as long as each other.
_LENGTHS = (5, 19, 3, 11)

FAULTS = (
    "what it says of a token changes with the tokens after it (it is not causal)",
    "its logprobs or hidden states are not those of its own forward, one sequence at a time",
    "its gradients are not those of its own forward, one sequence at a time",
    "it limits attention to windows or chunks that its attention function is not told of",
)


def check_batch(lm: PreTrainedModel) -> Packed:
    """Random tokens over the whole vocabulary, the same on every rank."""
    limit = position_limit(lm.config) or max(_LENGTHS)
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(lm.config.get_text_config().vocab_size)
    drawn = [torch.randint(vocabulary, (min(n, limit),), generator=generator) for n in _LENGTHS]
    return pack([Segment(tokens.tolist(), 1) for tokens in drawn])


def differences(
    lm: PreTrainedModel,
    batch: Packed,
    packed: Callable[[Packed], Tensor],
    own: Callable[[Tensor], Tensor],
) -> Tensor:
    """(4,) float64, one for each of FAULTS: how far a model is from what it should be.

    packed(batch) and own(tokens of one sequence) give the same rows, sequence after sequence; a
    token's rows must not depend on later tokens. The first two are largest differences in `unit`,
    the third is relative to the norm, the fourth counts. NaN where something is not finite.
    """
    sequences = batch.tokens.split(batch.cu_seqlens.diff().tolist())
    with torch.enable_grad(), with_own_attention(lm):
        with _embeddings(lm) as leaves:
            wanted = torch.cat([own(tokens) for tokens in sequences])
        wanted_grad = _gradient(wanted, leaves, len(sequences))
        whole = own(sequences[1]).detach()
        part = own(sequences[1][: max(2, sequences[1].numel() // 2)]).detach()
    with torch.enable_grad(), watch_windows() as windows:
        with _embeddings(lm) as leaves:
            found = packed(batch)
        count = 1 if takes_packed(lm) else len(sequences)
        found_grad = _gradient(found, leaves, count)
    apart = [_largest(whole[: len(part)], part), _largest(found, wanted)]
    results = [difference / unit(wanted) for difference in apart]
    # A model whose weights are all 0 has no gradient, and two of those agree.
    size = wanted_grad.norm().clamp_min(torch.finfo(wanted_grad.dtype).tiny)
    results.append(float((found_grad - wanted_grad).norm() / size))
    results.append(float(len(windows.unknown)))
    return torch.tensor(results, dtype=torch.float64, device=batch.tokens.device)


def fault_of(found: Sequence[float], dtype: torch.dtype) -> str | None:
    """The first difference that is too large, in words; None if there is none."""
    exact = dtype in (torch.float32, torch.float64)
    nats, relative = (1e-3, 1e-2) if exact else (0.25, 0.3)
    for fault, difference, limit in zip(FAULTS, found, (nats, nats, relative, 0.0), strict=True):
        if not difference <= limit:
            return f"{fault} (by {difference:.2g})" if limit else fault
    return None


def unit(rows: Tensor) -> float:
    """What differences between such rows are measured in: 1, or 1% of the largest if that is more.

    A model that has been trained far off has logprobs of -10,000, which no two ways of computing
    them agree on to a thousandth.
    """
    return max(1.0, float(rows.detach().abs().max()) / 100)


def _largest(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach() - wanted.detach()).abs().max())


def _gradient(rows: Tensor, leaves: list[Tensor], forwards: int) -> Tensor:
    """Of a weighted sum of the rows; embeddings of a forward side by side, forwards end to end."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(rows.shape, generator=generator).to(rows)
    grads = torch.autograd.grad((rows * weights).sum(), leaves, allow_unused=True)
    flat = [
        (torch.zeros_like(leaf) if grad is None else grad).flatten(0, -2).float()
        for leaf, grad in zip(leaves, grads, strict=True)
    ]
    per_forward = len(flat) // forwards
    return torch.cat([torch.cat(flat[i::per_forward]) for i in range(per_forward)], dim=-1)


@contextmanager
def _embeddings(lm: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Inside, the input embeddings' outputs are leaves, collected in the order of the calls."""
    leaves: list[Tensor] = []

    def replace(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        leaves.append(leaf)
        return leaf.clone()  # CTRL scales its embeddings in place

    handle = lm.get_input_embeddings().register_forward_hook(replace)
    try:
        yield leaves
    finally:
        handle.remove()
