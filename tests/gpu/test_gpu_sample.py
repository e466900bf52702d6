"""linear_sample and extra ids on the GPU."""

from __future__ import annotations

import pytest
import torch

import s2srm_kernels
from benchmarks import checking
from benchmarks.problems import normal_problem
from benchmarks.providers.ours import unavailable
from benchmarks.shapes import Shape

IMPLS = ("triton", "cpp", "reference")
SHAPES = (Shape("odd", 300, 72, 1000), Shape("one above", 129, 128, 4097), Shape("small", 5, 16, 7))


def available(op, impl, device):
    reason = unavailable(op, impl, device)
    if reason is not None:
        if impl == "triton" and device.type == "cuda":
            pytest.fail(reason)
        pytest.skip(reason)


def inputs(shape, dtype, device):
    problem = normal_problem(shape, dtype, device)
    seeds = torch.arange(shape.num_rows, device=device) * 7919 - 3
    return problem.hidden.detach(), problem.weight.detach(), seeds, seeds % 11


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_the_same_tokens_on_every_backend_and_the_bits_of_linear_logprobs(shape, impl, device):
    available("linear_sample", impl, device)
    hidden, weight, seeds, positions = inputs(shape, torch.float32, device)
    drawn = s2srm_kernels.linear_sample(hidden, weight, seeds, positions, impl=impl)
    on_cpu = [tensor.cpu() for tensor in (hidden, weight, seeds, positions)]
    right = s2srm_kernels.linear_sample(*on_cpu, impl="reference")
    assert torch.equal(drawn.tokens.cpu(), right.tokens)
    made = s2srm_kernels.linear_logprobs(hidden, weight, drawn.tokens, impl=impl)
    assert torch.equal(made.logprobs, drawn.logprobs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_row_draws_the_same_alone_and_in_a_batch(dtype, impl, device):
    available("linear_sample", impl, device)
    tensors = inputs(SHAPES[0], dtype, device)
    together = s2srm_kernels.linear_sample(*tensors, suppress=[0, 999], impl=impl)
    assert not torch.isin(together.tokens, torch.tensor([0, 999], device=device)).any()
    hidden, weight, seeds, positions = tensors
    for rows in (slice(0, 1), slice(131, 132), slice(100, 165)):
        some = (hidden[rows], weight, seeds[rows], positions[rows])
        alone = s2srm_kernels.linear_sample(*some, suppress=[0, 999], impl=impl)
        assert torch.equal(alone.tokens, together.tokens[rows])
        assert torch.equal(alone.logprobs, together.logprobs[rows])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_extra_ids_are_exact_and_differentiable(dtype, impl, device):
    available("linear_logprobs", impl, device)
    problem = normal_problem(SHAPES[0], dtype, device, ignored=0.3)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1000, (300, 3), generator=generator).to(device)
    upstream = torch.randn(300, 3, generator=generator).to(device)
    upstream[problem.target < 0] = 0

    def truth(wide):
        leaves = [t.detach().to(wide).requires_grad_() for t in problem.inputs.values()]
        z = problem.logits(*leaves, None)
        made = torch.log_softmax(z, dim=-1).gather(1, ids) * (problem.target >= 0)[:, None]
        return [made.detach(), *torch.autograd.grad(made, leaves, upstream.to(made.dtype))]

    found = s2srm_kernels.linear_logprobs(
        *(problem.hidden, problem.weight, problem.target), extra_ids=ids, impl=impl
    ).extra_logprobs
    made = [found.detach(), *torch.autograd.grad(found, list(problem.inputs.values()), upstream)]
    for value, exact, eager in zip(made, truth(torch.float64), truth(dtype), strict=True):
        allowed = checking.limit("rows", checking.relative_error(eager, exact), dtype)
        assert checking.relative_error(value, exact) <= allowed
