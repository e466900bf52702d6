import pytest
import torch

from s2srm_kernels import linear_logprobs
from tests.kernels import naive

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = [(1, 1, 2), (7, 5, 11), (130, 33, 300), (257, 64, 1003)]
HEADS = [{}, {"softcap": 2.5}, {"temperature": 0.6}, {"softcap": 3.0, "temperature": 1.7}]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_equal_autograd(shape, head):
    hidden, weight, bias, target = naive.make(*shape, ignored=0.0 if shape[0] == 1 else 0.3)
    ours = linear_logprobs(hidden, weight, target, bias=bias, **head)
    theirs = naive.logprobs(hidden, weight, target, bias=bias, **head)
    torch.testing.assert_close(tuple(ours), theirs, rtol=1e-11, atol=1e-11)
    assert all(o.dtype == torch.float64 for o in ours)
    inputs = (hidden, weight, bias)
    for seed in (1, 2):
        torch.testing.assert_close(
            naive.grads(linear_logprobs(hidden, weight, target, bias=bias, **head), inputs, seed),
            naive.grads(naive.logprobs(hidden, weight, target, bias=bias, **head), inputs, seed),
            rtol=1e-10,
            atol=1e-10,
        )


@pytest.mark.parametrize("output", ["logprobs", "entropy", "lse"])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_gradcheck_of_each_output_alone(output, head):
    hidden, weight, bias, target = naive.make(5, 3, 7, seed=3)

    def run(h, w, b):
        return getattr(linear_logprobs(h, w, target, bias=b, **head), output)

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


def test_without_entropy_it_is_zeros_without_gradient_and_the_rest_is_unchanged():
    hidden, weight, bias, target = naive.make(9, 4, 13)
    full = linear_logprobs(hidden, weight, target, bias=bias)
    bare = linear_logprobs(hidden, weight, target, bias=bias, with_entropy=False)
    assert not bare.entropy.requires_grad and not bare.entropy.any()
    assert torch.equal(bare.logprobs, full.logprobs) and torch.equal(bare.lse, full.lse)
    inputs = (hidden, weight, bias)
    ours = naive.grads((bare.logprobs, bare.lse), inputs)
    theirs = naive.logprobs(hidden, weight, target, bias=bias)
    torch.testing.assert_close(ours, naive.grads((theirs[0], theirs[2]), inputs))


def test_logprobs_never_exceed_zero():
    hidden, weight, _, target = naive.make(300, 16, 50, dtype=torch.float32, ignored=0, scale=4)
    target = (hidden @ weight.t()).argmax(1)  # the largest logprob of every row
    assert (linear_logprobs(hidden, weight, target).logprobs <= 0).all()


def test_suppressed_tokens_have_no_mass_no_entropy_and_no_gradient():
    hidden, weight, bias, target = naive.make(6, 4, 9, ignored=0)
    target = target.clamp(max=5)
    suppressed = bias.detach().clone()
    suppressed[6:] = -torch.inf
    suppressed.requires_grad_()
    ours = linear_logprobs(hidden, weight, target, bias=suppressed)
    theirs = naive.logprobs(hidden, weight[:6], target, bias=bias[:6])
    torch.testing.assert_close(tuple(ours), theirs)
    d_hidden, d_weight, d_bias = naive.grads(ours, (hidden, weight, suppressed))
    assert not d_weight[6:].any() and not d_bias[6:].any()
    assert d_hidden.isfinite().all() and d_weight[:6].any()


def test_second_derivative_is_an_error():
    hidden, weight, _, target = naive.make(4, 3, 5, bias=False, ignored=0)
    first = torch.autograd.grad(
        linear_logprobs(hidden, weight, target).logprobs.sum(), hidden, create_graph=True
    )[0]
    with pytest.raises(NotImplementedError, match="second-order"):
        first.sum().backward()
