"""How many responses can be written at a time in so much memory for keys and values.

The size of a cache is measured, not computed from the configuration: architectures differ in what
they keep (grouped and latent heads, recurrent states, sliding windows, which count in full here).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from s2srm.config import SamplingConfig
from s2srm.errors import UserError
from s2srm.rollout.manner import CACHE

_SHORT, _LONG = 4, 12


class CacheSize(NamedTuple):
    """Bytes that one sequence of n tokens keeps: fixed + n * per_token."""

    fixed: float
    per_token: float

    def of(self, num_tokens: int) -> float:
        """Bytes of one sequence."""
        return self.fixed + num_tokens * self.per_token


def measure_cache(model: PreTrainedModel) -> CacheSize:
    """By two forwards; model has its weights and is in evaluation mode."""
    short, long = (_cached_bytes(model, length) for length in (_SHORT, _LONG))
    per_token = (long - short) / (_LONG - _SHORT)
    return CacheSize(short - _SHORT * per_token, per_token)


def _cached_bytes(model: PreTrainedModel, length: int) -> int:
    device = next(model.parameters()).device
    ids = torch.arange(length, device=device)[None] % model.config.get_text_config().vocab_size
    cache: Any = getattr(model(input_ids=ids, use_cache=True), CACHE)
    held = [value for layer in cache.layers for value in vars(layer).values()]
    return sum(value.numel() * value.element_size() for value in held if isinstance(value, Tensor))


def rollout_batches(
    lengths: Sequence[int], sampling: SamplingConfig, pads: bool, size: CacheSize | None
) -> Iterator[list[int]]:
    """Prompts of these lengths in batches, shortest first: at most batch_size in each, and no more
    than kv_cache_gib holds at the longest prompt and response. Without padding, of one length.

    size: None where nothing is kept, or there is no budget. UserError if one does not fit alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups = [order]
    if not pads:
        groups = [list(group) for _, group in itertools.groupby(order, lambda i: lengths[i])]
    for group in groups:
        batch: list[int] = []
        for i in group:
            # Row i is the longest so far, and the others are padded to it.
            most = min(sampling.batch_size, _most_rows(lengths[i], sampling, size))
            if batch and len(batch) >= most:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


def _most_rows(length: int, sampling: SamplingConfig, size: CacheSize | None) -> int:
    if size is None:
        return sampling.batch_size
    tokens = length + sampling.max_new_tokens
    budget = sampling.kv_cache_gib
    rows = int(budget * 2**30 // max(1.0, size.of(tokens)))
    if rows == 0:
        raise UserError(
            f"sampling.kv_cache_gib {budget:g}: one response of {tokens} tokens, its "
            f"prompt included, needs {size.of(tokens) / 2**30:.3g} GiB; raise it, or lower "
            "sampling.max_new_tokens or data.max_prompt_tokens"
        )
    return rows
