"""The CPU's kernels in float32: errors against float64 beside those of F.linear and autograd.

The largest of a few errors is chance, so over many problems their root mean square is compared; no
error is held below that of rounding the largest value once.
"""

import pytest
import torch
import torch.nn.functional as F

from s2srm_kernels import (
    dispatch,
    linear_cross_entropy,
    linear_logprobs,
    linear_ppo_loss,
    linear_token_stats,
)

from . import naive

_REASON = dispatch.load("cpp", "cpu")
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

# (N, D, V), scale of the weight, share of ignored rows, options of the head.
PROBLEMS = [
    ((100, 7, 300), 1.0, 0.0, {}),
    ((93, 33, 1500), 0.3, 0.0, {}),
    ((120, 64, 1000), 0.1, 0.0, {}),
    ((1, 64, 1000), 0.3, 0.0, {}),
    ((33, 16, 257), 1.0, 0.2, {"softcap": 5.0}),
    ((60, 40, 700), 1.0, 0.0, {"softcap": 5.0, "temperature": 0.7}),
    ((300, 300, 2000), 0.1, 0.2, {"temperature": 1.7}),
    ((40, 600, 5000), 0.05, 0.0, {}),
]


def _hold(ours, eager, exact):
    for our, other, truth in zip(ours, eager, exact, strict=True):
        once = truth.abs().max() * 2**-24
        our_error, other_error = ((t.double() - truth).square().mean().sqrt() for t in (our, other))
        assert our_error <= 2 * torch.maximum(other_error, once)


def _losses(seed):
    """Pairs of (ours, eager) from (hidden, weight, bias, target, options) to outputs."""

    def rows(like):
        g = torch.Generator().manual_seed(seed)
        return torch.randn(3, like.shape[0], generator=g)

    def our_loss(hidden, weight, bias, target, options):
        old, advantages, ref = rows(hidden)
        loss, _ = linear_ppo_loss(
            *(hidden, weight, target, old - 4, advantages),
            **{"ref_logprobs": ref - 4, "kl_coef": 0.1, "entropy_coef": 0.01, "bias": bias},
            **{"max_log_ratio": 1.0, "impl": "cpp", **options},
        )
        return [loss]

    def eager_loss(hidden, weight, bias, target, options):
        old, advantages, ref = rows(hidden).to(hidden.dtype)
        loss, _ = naive.ppo_loss(
            *(hidden, weight, target, old - 4, advantages),
            **{"ref_logprobs": ref - 4, "kl_coef": 0.1, "entropy_coef": 0.01, "bias": bias},
            **{"max_log_ratio": 1.0, **options},
        )
        return [loss]

    return {
        "cross_entropy": (
            lambda h, w, b, t, o: [linear_cross_entropy(h, w, t, bias=b, impl="cpp", **o)],
            lambda h, w, b, t, o: [naive.cross_entropy(h, w, t, bias=b, **o)],
        ),
        "cross_entropy of rows": (
            lambda h, w, b, t, o: [
                linear_cross_entropy(h, w, t, bias=b, reduction="none", impl="cpp", **o)
            ],
            lambda h, w, b, t, o: [naive.cross_entropy(h, w, t, bias=b, reduction="none", **o)],
        ),
        "logprobs": (
            lambda h, w, b, t, o: list(linear_logprobs(h, w, t, bias=b, impl="cpp", **o)),
            lambda h, w, b, t, o: list(naive.logprobs(h, w, t, bias=b, **o)),
        ),
        "ppo": (our_loss, eager_loss),
    }


@pytest.mark.parametrize("loss", _losses(0))
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_outputs_and_gradients_err_at_most_twice_as_much_as_eager(problem, loss):
    shape, scale, ignored, options = problem
    *inputs, target = naive.make(*shape, seed=1, dtype=torch.float32, ignored=ignored)
    inputs[1] = (inputs[1].detach() * scale).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in inputs]
    ours, eager = _losses(1)[loss]
    results = []
    for function, tensors in ((ours, inputs), (eager, inputs), (eager, exact)):
        outputs = function(*tensors, target, options)
        results.append([*(o.detach() for o in outputs), *naive.grads(outputs, tensors)])
    # A loss of one number is a chance that no sum of rows can be held to: its gradients are.
    skip = 1 if results[0][0].dim() == 0 else 0
    _hold(*(result[skip:] for result in results))


def test_many_equal_logits_below_the_maximum():
    """An exponential that errs by a unit, or a sum in sequence, adds up in each of 1279 terms."""
    for gap in (0.5, 2.0, 3.5, 7.0, 11.0):
        for at in (0, 700, 1279):
            hidden, weight = torch.ones(2, 1), torch.full((1280, 1), -gap)
            weight[at] = 0
            target = torch.tensor([at, 3])
            ours = linear_token_stats(hidden, weight, target, impl="cpp")
            logits = F.linear(hidden, weight)
            exact = logits.double()
            _hold([ours.lse], [logits.logsumexp(1)], [exact.logsumexp(1)])
            logp = [z.log_softmax(1).gather(1, target[:, None])[:, 0] for z in (logits, exact)]
            _hold([ours.logprobs], *([p] for p in logp))


def test_weight_gradients_of_a_hundred_rows():
    worst = 0.0
    for seed in range(24):
        n, d, v = 85 + seed, (7, 16, 33, 64)[seed % 4], (100, 300, 1000)[seed % 3]
        hidden, weight, _, target = naive.make(
            n, d, v, seed=seed, dtype=torch.float32, bias=False, ignored=0.0
        )

        def gradient(function, weight, hidden=hidden, target=target):
            weight = weight.detach().requires_grad_()
            loss = function(hidden.detach().to(weight.dtype), weight, target)
            return torch.autograd.grad(loss, weight)[0].double()

        def eager(hidden, weight, target):
            return F.cross_entropy(F.linear(hidden, weight), target)

        exact = gradient(eager, weight.double())
        ours = gradient(lambda h, w, t: linear_cross_entropy(h, w, t, impl="cpp"), weight)
        errors = [(g - exact).abs().max() for g in (ours, gradient(eager, weight))]
        worst = max(worst, float(errors[0] / errors[1]))
    assert worst <= 2


def test_a_softcap_that_is_reached_has_no_slope():
    """However softcap / temperature is rounded."""
    hidden = torch.ones(3, 1, requires_grad=True)
    weight = torch.tensor([[400.0], [300.0], [-250.0]], requires_grad=True)
    target = torch.tensor([0, 1, 2])
    for temperature in (1.0, 0.7, 1.7):
        for workspace in (None, 1):
            loss = linear_cross_entropy(
                *(hidden, weight, target),
                **{"softcap": 5.0, "temperature": temperature, "workspace_bytes": workspace},
                impl="cpp",
            )
            for gradient in torch.autograd.grad(loss, (hidden, weight)):
                assert not gradient.any()
