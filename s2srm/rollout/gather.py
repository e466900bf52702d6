"""Responses that the ranks sampled apart, whole on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2srm import distributed
from s2srm.rollout.base import Response


def gather_responses(shares: Sequence[Sequence[int]], mine: Sequence[Response]) -> list[Response]:
    """All responses, by number. All ranks must call it.

    Args:
        shares: the numbers of every rank's responses, the same on all ranks.
        mine: the responses of shares[rank], in its order.
    """
    device = distributed.device()
    # The sign says whether it is finished.
    lengths = [-len(r.tokens) if r.finished else len(r.tokens) for r in mine]
    tokens = [token for response in mine for token in response.tokens]
    signed = _whole(torch.tensor(lengths, dtype=torch.int64, device=device))
    flat = _whole(torch.tensor(tokens, dtype=torch.int64, device=device))
    found: dict[int, Response] = {}
    first = 0
    numbers = [number for share in shares for number in share]
    for number, length in zip(numbers, signed, strict=True):
        found[number] = Response(flat[first : first + abs(length)], finished=length < 0)
        first += abs(length)
    return [found[number] for number in range(len(numbers))]


def _whole(local: Tensor) -> list[int]:
    return torch.cat(distributed.gather_tensors(local)).tolist()
