"""The anchors: what the arithmetic or the traffic of an operation costs by itself.

An operation over the vocabulary needs one product in forward; three with gradients where the row
coefficients are known in forward (logits, d_hidden, d_weight), four where they are not (logits
twice). The anchor runs just these, on the live rows, into buffers that exist already.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.problems import Problem, SequenceProblem

FORWARD, BOTH = "forward", "forward+backward"
MODES = (FORWARD, BOTH)
_PRODUCTS = {"linear_cross_entropy": 3, "linear_ppo_loss": 3, "linear_logprobs": 4}
# Bytes read and written for each token: two float32 in and two out; two int64 in and a float32 out.
BYTES_PER_TOKEN = {"gae": 16, "token_rewards": 20}


def modes_of(op: str) -> tuple[str, ...]:
    """linear_token_stats has no gradient."""
    return MODES if op in _PRODUCTS else (FORWARD,)


def num_products(op: str, mode: str) -> int:
    return 1 if mode == FORWARD else _PRODUCTS[op]


def product_flops(problem: Problem, count: int) -> float:
    """Operations of `count` products over the live rows."""
    shape = problem.shape
    return 2.0 * count * problem.num_live * shape.hidden_size * shape.vocab_size


def products(problem: Problem, count: int) -> Callable[[], None]:
    """1: logits; 3: logits, d_hidden, d_weight; 4: logits twice."""
    assert count in (1, 3, 4), count
    hidden = problem.hidden.detach()[problem.live]
    weight = problem.weight.detach()
    logits = hidden.new_empty((hidden.shape[0], weight.shape[0]))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        for _ in range(2 if count == 4 else 1):
            torch.mm(hidden, weight.t(), out=logits)
        if count > 1:
            torch.mm(logits, weight, out=d_hidden)
            torch.mm(logits.t(), hidden, out=d_weight)

    return run


def copy(op: str, problem: SequenceProblem) -> Callable[[], None]:
    """A device copy that moves as many bytes, read and written together."""
    size = BYTES_PER_TOKEN[op] * problem.shape.num_rows // 2
    source = torch.randint(127, (size,), dtype=torch.int8, device=problem.device)
    destination = torch.empty_like(source)

    def run() -> None:
        destination.copy_(source)

    return run
