import pytest
import torch

from s2srm_kernels import linear_cross_entropy
from tests.kernels import naive

pytestmark = pytest.mark.usefixtures("backend")

OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0},
    {"z_loss": 0.02},
    {"softcap": 2.0},
    {"temperature": 0.5},
    {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 3.0, "temperature": 1.4},
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options, reduction):
    hidden, weight, bias, target = naive.make(5, 3, 7, seed=5)
    row_weight = torch.linspace(-1, 2, 5, dtype=torch.float64)

    def run(h, w, b):
        return linear_cross_entropy(
            h, w, target, bias=b, reduction=reduction, row_weight=row_weight, **options
        )

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(7, 5, 11), (257, 33, 300)], ids=str)
def test_equals_torch_with_random_upstream_gradients(shape, options, reduction):
    hidden, weight, bias, target = naive.make(*shape, seed=6)
    row_weight = torch.randn(shape[0], generator=torch.Generator().manual_seed(7)).double()
    kwargs = {"bias": bias, "reduction": reduction, "row_weight": row_weight, **options}
    ours = linear_cross_entropy(hidden, weight, target, **kwargs)
    theirs = naive.cross_entropy(hidden, weight, target, **kwargs)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    for seed in (1, 2):
        ours = linear_cross_entropy(hidden, weight, target, **kwargs)
        theirs = naive.cross_entropy(hidden, weight, target, **kwargs)
        torch.testing.assert_close(
            naive.grads([ours], (hidden, weight, bias), seed),
            naive.grads([theirs], (hidden, weight, bias), seed),
            rtol=1e-10,
            atol=1e-10,
        )


def test_mean_divides_by_live_rows_and_not_by_their_weight():
    hidden, weight, _, target = naive.make(10, 4, 6, bias=False)
    weights = torch.full((10,), 0.25)
    mean = linear_cross_entropy(hidden, weight, target, row_weight=weights)
    plain = linear_cross_entropy(hidden, weight, target)
    torch.testing.assert_close(mean, 0.25 * plain)


def test_another_ignore_index_and_int32_targets():
    hidden, weight, _, target = naive.make(12, 4, 6, bias=False, ignored=0)
    target[[1, 5]] = 0
    ours = linear_cross_entropy(hidden, weight, target.int(), ignore_index=0)
    theirs = naive.cross_entropy(hidden, weight, target, ignore_index=0)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_an_error(reduction):
    hidden, weight, _, target = naive.make(4, 3, 5, bias=False, ignored=0)
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()
    first = torch.autograd.grad(loss, hidden, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second-order"):
        first.square().sum().backward()


def test_backward_twice_through_a_retained_graph():
    hidden, weight, _, target = naive.make(4, 3, 5, bias=False, ignored=0)
    loss = linear_cross_entropy(hidden, weight, target)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, hidden)[0])


def test_row_weight_must_be_a_constant():
    hidden, weight, _, target = naive.make(4, 3, 5, bias=False)
    with pytest.raises(ValueError, match="row_weight requires a gradient"):
        linear_cross_entropy(hidden, weight, target, row_weight=torch.ones(4, requires_grad=True))
