"""linear_sample at decode shapes against torch's own route; run with `make bench`.

    logits             F.linear alone: the product, with the (B, V) logits written
    torch-multinomial  the same, softmax, torch.multinomial and the drawn token's logprob
    s2srm-*            tokens and logprobs of a backend, no logits

Draws of two sides differ: their noise does. What they are drawn from is held to the exact
distribution in tests/kernels/test_linear_sample.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import microbench

SIDES = ("logits", "torch-multinomial", "s2srm-triton", "s2srm-cpp", "s2srm-reference")
TEMPERATURE = 0.7


class DecodeShape(NamedTuple):
    """B rows of D hidden values, V columns."""

    name: str
    batch: int
    depth: int
    vocabulary: int


SHAPES = (
    DecodeShape("stories260k-1", 1, 64, 512),
    DecodeShape("stories260k-64", 64, 64, 512),
    DecodeShape("smollm2-135m-1", 1, 576, 49152),
    DecodeShape("smollm2-135m-64", 64, 576, 49152),
)
CASES = [pytest.param(shape, side, id=f"{shape.name}-{side}") for shape in SHAPES for side in SIDES]


@pytest.mark.parametrize(("shape", "side"), CASES)
def bench_linear_sample(benchmark: Any, shape: DecodeShape, side: str) -> None:
    benchmark.group = f"linear_sample, {shape.name}"
    generator = torch.Generator().manual_seed(0)
    sizes = ((shape.batch, shape.depth), (shape.vocabulary, shape.depth))
    hidden, weight = (
        torch.randn(size, generator=generator).to(microbench.DEVICE, microbench.DTYPE)
        for size in sizes
    )
    microbench.time_call(benchmark, _side(side, hidden, weight * shape.depth**-0.5))


def _side(side: str, hidden: Tensor, weight: Tensor) -> Callable[[], object]:
    if side == "logits":
        return lambda: F.linear(hidden, weight)
    if side == "torch-multinomial":
        return lambda: _multinomial(hidden, weight)
    from s2srm_kernels import dispatch, linear_sample

    impl = side.removeprefix("s2srm-")
    try:
        dispatch.select("linear_sample", impl, hidden.device)
    except ValueError as error:
        pytest.skip(str(error))
    places = torch.arange(len(hidden), device=hidden.device)
    return lambda: linear_sample(hidden, weight, places, places, temperature=TEMPERATURE, impl=impl)


def _multinomial(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = (F.linear(hidden, weight).float() / TEMPERATURE).log_softmax(dim=1)
    tokens = logprobs.exp().multinomial(1)
    return tokens, logprobs.gather(1, tokens)
