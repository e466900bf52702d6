"""What the cases of the Triton engine share; they run in Triton's interpreter.

test_triton_interpreter.py sets TRITON_INTERPRET=1 before triton is imported, in a process of its
own. Buffers are filled with NaN before a kernel sees them.
"""

import kernels_naive as naive
import pytest
import torch

from s2srm_kernels.lm_head.engine import Upstream
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.reference import ReferenceEngine
from s2srm_kernels.triton import problem
from s2srm_kernels.triton.engine import TritonEngine

assert problem.INTERPRETED
OURS, REFERENCE = TritonEngine(), ReferenceEngine()
HEADS = [{}, {"softcap": 2.5, "temperature": 0.8}]


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """torch.empty gives NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


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
