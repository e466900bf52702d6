"""Log-probabilities of several chosen ids per row, and their gradients."""

import pytest
import torch

from s2srm_kernels import (
    Logprobs,
    LogprobsAtIds,
    SkipReport,
    TokenStats,
    TokenStatsAtIds,
    linear_logprobs,
    linear_token_stats,
)
from tests.kernels import naive

BACKENDS = ["reference", "cpp"]


def ids_of(target, columns, count, seed=0):
    """(N, K) with the target, a pair of equal ids and padding among them; ignored rows junk."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(columns, (len(target), count), generator=generator)
    ids[:, 0] = target.clamp(min=0)
    if count > 2:
        ids[::2, 1] = ids[::2, 2]
        ids[::3, -1] = -1
        ids[1::4, 2] = target.clamp(min=0)[1::4]
    ids[target < 0] = 10**9
    return ids


def eager(hidden, weight, bias, target, ids, softcap=None, temperature=1.0):
    z = hidden @ weight.t() + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = (z / temperature).log_softmax(1)
    live = target >= 0
    picked = logp.gather(1, torch.cat([target[:, None], ids], 1).clamp(0, len(weight) - 1))
    padding = torch.cat([~live[:, None], (ids < 0) | ~live[:, None]], 1)
    picked = picked.masked_fill(padding, 0)
    entropy = -(logp.exp() * logp).sum(1) * live
    lse = (z / temperature).logsumexp(1) * live
    return picked[:, 0], entropy, lse, picked[:, 1:]


def gradients(function, tensors, grads):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    results = function(*leaves)
    torch.autograd.backward(
        list(results), [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]
    )
    return [t.detach() for t in results] + [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("shape", [(9, 16, 301, 5), (3, 7, 40, 1), (300, 8, 600, 3)], ids=str)
@pytest.mark.parametrize("impl", BACKENDS)
def test_values_and_gradients(impl, shape, options):
    rows, depth, columns, count = shape
    *tensors, target = naive.make(rows, depth, columns, dtype=torch.float64)
    ids = ids_of(target, columns, count)
    grads = [torch.randn(rows, dtype=torch.float64) for _ in range(3)]
    grads.append(torch.randn(rows, count, dtype=torch.float64))
    expected = gradients(lambda h, w, b: eager(h, w, b, target, ids, **options), tensors, grads)
    found = gradients(
        lambda h, w, b: linear_logprobs(h, w, target, bias=b, extra_ids=ids, impl=impl, **options),
        tensors,
        grads,
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("confident", [False, True])
def test_error_is_within_twice_eagers(impl, dtype, confident):
    *tensors, target = naive.make(40, 32, 500, dtype=torch.float64)
    tensors = [t.detach().to(dtype) for t in tensors]
    if confident:  # the first extra id has nearly all of the mass
        tensors[0] = (tensors[1][target.clamp(min=0)] * 2).to(dtype)
    ids = ids_of(target, 500, 4)
    grads = [torch.zeros(40), torch.zeros(40), torch.zeros(40), torch.rand(40, 4) + 0.5]
    exact = gradients(
        lambda h, w, b: eager(h, w, b, target, ids), [t.double() for t in tensors], grads
    )
    theirs = gradients(lambda h, w, b: eager(h, w, b, target, ids), tensors, grads)
    ours = gradients(
        lambda h, w, b: linear_logprobs(h, w, target, bias=b, extra_ids=ids, impl=impl),
        tensors,
        grads,
    )
    for name, e, t, o in zip(
        ("logp", "hidden", "weight", "bias"), exact[3:], theirs[3:], ours[3:], strict=True
    ):
        allowed = 2 * (t.double() - e).norm() + 1e-6 * e.norm()
        assert (o.double() - e).norm() <= allowed, name


@pytest.mark.parametrize("impl", BACKENDS)
def test_results_without_ids_and_the_target_among_them(impl):
    *tensors, target = (t.detach() for t in naive.make(20, 8, 70, dtype=torch.float32))
    hidden, weight, bias = tensors
    ids, live = ids_of(target, 70, 4), target >= 0
    plain = linear_logprobs(hidden, weight, target, bias=bias, impl=impl)
    with_ids = linear_logprobs(hidden, weight, target, bias=bias, extra_ids=ids, impl=impl)
    assert type(plain) is Logprobs and type(with_ids) is LogprobsAtIds
    assert all(torch.equal(a, b) for a, b in zip(plain, with_ids, strict=False))
    assert torch.equal(with_ids.extra_logprobs[live, 0], plain.logprobs[live])
    assert with_ids.extra_logprobs[~live].eq(0).all() and (with_ids.extra_logprobs <= 0).all()
    stats = linear_token_stats(hidden, weight, target, bias=bias, impl=impl)
    at_ids = linear_token_stats(hidden, weight, target, bias=bias, extra_ids=ids, impl=impl)
    assert type(stats) is TokenStats and type(at_ids) is TokenStatsAtIds
    assert all(torch.equal(a, b) for a, b in zip(stats, at_ids, strict=False))
    assert torch.equal(at_ids.extra_logprobs, with_ids.extra_logprobs)
    none = linear_logprobs(hidden, weight, target, extra_ids=ids[:, :0].int(), impl=impl)
    assert none.extra_logprobs.shape == (20, 0)
    empty = linear_logprobs(hidden[:0], weight, target[:0], extra_ids=ids[:0], impl=impl)
    assert empty.extra_logprobs.shape == (0, 4)
    # A row's bits in another batch.
    alone = linear_logprobs(
        hidden[3:4], weight, target[3:4], bias=bias, extra_ids=ids[3:4], impl=impl
    )
    assert torch.equal(alone.extra_logprobs, with_ids.extra_logprobs[3:4])


@pytest.mark.parametrize("impl", BACKENDS)
def test_skipped_blocks_hold_no_chosen_id(impl):
    # Every tile but that of the target has next to no mass; the ids lie in one of those.
    *tensors, target = naive.make(5, 8, 2000, dtype=torch.float64)
    tensors[2] = torch.full_like(tensors[2], -40).index_fill(0, torch.arange(256), 0)
    target = target.clamp(0, 255)
    ids = torch.full((5, 2), 700)
    ids[0] = -1
    grads = [torch.ones(5, dtype=torch.float64)] * 3 + [torch.ones(5, 2, dtype=torch.float64)]
    report = SkipReport()
    exact, skipping = (
        gradients(
            lambda h, w, b, options=options: linear_logprobs(
                h, w, target, bias=b, extra_ids=ids, impl=impl, **options
            ),
            tensors,
            grads,
        )
        for options in ({}, {"skip_mass": 1e-6, "skip_report": report})
    )
    assert report.mass.max() > 0
    torch.testing.assert_close(skipping, exact, rtol=1e-9, atol=1e-9)


def test_under_compile():
    hidden, weight, bias, target = naive.make(6, 8, 50, dtype=torch.float64)
    ids = ids_of(target, 50, 3)

    def loss(h, w):
        return linear_logprobs(h, w, target, bias=bias, extra_ids=ids).extra_logprobs.sum()

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "ids,message",
    [
        (torch.tensor([[0, 1], [2, 5]]), r"extra_ids\[1, 1\] is 5: neither in \[0, 5\) nor -1"),
        (torch.tensor([[-2, 1], [2, 5]]), r"extra_ids\[0, 0\] is -2"),
        (torch.zeros(3, 2).long(), r"extra_ids must have shape \(2, K\)"),
        (torch.zeros(2).long(), r"extra_ids must have shape \(2, K\)"),
        (torch.zeros(2, 2), "extra_ids must be int64 or int32, got torch.float32"),
        ([[0], [1]], "extra_ids must be a torch.Tensor, got list"),
    ],
)
@pytest.mark.parametrize("operation", [linear_logprobs, linear_token_stats])
@pytest.mark.parametrize("impl", BACKENDS)
def test_bad_ids(impl, operation, ids, message):
    with pytest.raises(ValueError, match=message):
        operation(
            torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2).long(), extra_ids=ids, impl=impl
        )
