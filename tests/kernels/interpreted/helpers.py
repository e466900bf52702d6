"""What the tests of the Triton engine share: ours, the reference engine, and heads for both."""

import torch

from s2srm_kernels.lm_head.engine import Upstream
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.reference import ReferenceEngine
from s2srm_kernels.triton import problem
from s2srm_kernels.triton.engine import TritonEngine
from tests.kernels import naive

assert problem.INTERPRETED
OURS, REFERENCE = TritonEngine(), ReferenceEngine()
HEADS = [{}, {"softcap": 2.5, "temperature": 0.8}]


def head_of(n, d, v, *, dtype=torch.float64, bias=True, seed=0, softcap=None, temperature=1.0):
    """A head of n rows with some ignored."""
    hidden, weight, b, target = naive.make(n, d, v, seed=seed, dtype=dtype, bias=bias)
    tensors = (None if t is None else t.detach() for t in (hidden, weight, b))
    return Head(*tensors, target, softcap, temperature, -100, None)


def upstream_of(head, seed=0, terms=("entropy", "lse", "mean_logprob")):
    """Random upstream gradients of the statistics."""
    g = torch.Generator().manual_seed(seed)
    fields = ("logprobs", *terms)
    values = torch.randn(len(fields), head.num_live, generator=g, dtype=torch.float64)
    return Upstream(**dict(zip(fields, values.to(head.dtype), strict=True)))


def assert_close(ours, theirs, rtol=1e-10):
    """Of tensors or tuples of them; nan nowhere."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
