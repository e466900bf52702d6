import pytest
import torch

from s2srm_kernels import linear_logprobs, linear_ppo_loss
from tests.kernels import naive

pytestmark = pytest.mark.usefixtures("backend")

OPTIONS = [
    {},
    {"clip_low": 0.1, "clip_high": 0.4},
    {"kl_coef": 0.3},
    {"entropy_coef": 0.2},
    {"entropy_coef": -0.1, "softcap": 3.0},
    {"normalizer": 17.0},
    {"normalizer": torch.tensor(5.5, dtype=torch.float64), "temperature": 0.7},
    {"kl_coef": 0.1, "entropy_coef": 0.05, "softcap": 2.0, "temperature": 1.3, "normalizer": 3},
    {"max_log_ratio": 0.4, "kl_coef": 0.3},
]


def problem(n, d, v, seed=8, dtype=torch.float64):
    """Ratios on both sides of the clip range, advantages of both signs."""
    hidden, weight, bias, target = naive.make(n, d, v, seed=seed, dtype=dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logp = naive.logprobs(hidden, weight, target, bias=bias)[0]
    noise = torch.randn(3, n, generator=g, dtype=torch.float64).to(dtype)
    return (hidden, weight, bias), target, logp + 0.5 * noise[0], noise[1], logp + 0.3 * noise[2]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options):
    inputs, target, old, advantages, ref = problem(6, 3, 7)

    def run(h, w, b):
        return linear_ppo_loss(
            h, w, target, old, advantages, bias=b, ref_logprobs=ref, **options
        ).loss

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(7, 5, 11), (300, 33, 200)], ids=str)
def test_equals_autograd(shape, options):
    inputs, target, old, advantages, ref = problem(*shape)
    hidden, weight, bias = inputs
    args = (hidden, weight, target, old, advantages)
    kwargs = {"bias": bias, "ref_logprobs": ref, **options}
    loss, metrics = linear_ppo_loss(*args, **kwargs)
    their_loss, their_metrics = naive.ppo_loss(*args, **kwargs)
    torch.testing.assert_close(loss, their_loss)
    torch.testing.assert_close(tuple(metrics), tuple(m.detach() for m in their_metrics))
    assert 0 < metrics.clip_fraction < 1 or shape[0] < 10
    torch.testing.assert_close(naive.grads([loss], inputs, 3), naive.grads([their_loss], inputs, 3))


def test_metrics_are_against_the_old_policy_without_a_reference():
    (hidden, weight, bias), target, old, advantages, _ = problem(40, 5, 11)
    metrics = linear_ppo_loss(hidden, weight, target, old, advantages, bias=bias).metrics
    live = target != -100
    difference = (linear_logprobs(hidden, weight, target, bias=bias).logprobs - old)[live]
    torch.testing.assert_close(metrics.k1, difference.mean().detach())
    torch.testing.assert_close(metrics.ratio_max, difference.exp().max().detach())
    names = ("clip_fraction", "k1", "k3", "entropy", "ratio_mean", "ratio_max", "bounded_fraction")
    assert metrics._fields == names
    assert not any(m.requires_grad for m in metrics)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "clipped"),
    [
        (0.5, 1.0, True),
        (0.5, -1.0, False),
        (-0.5, 1.0, False),
        (-0.5, -1.0, True),
        (0.1, 1.0, False),
    ],
)
def test_the_clip_binds_only_where_it_makes_the_objective_smaller(log_ratio, advantage, clipped):
    hidden, weight, _, target = naive.make(1, 3, 5, bias=False, ignored=0)
    old = linear_logprobs(hidden, weight, target).logprobs.detach() - log_ratio
    loss, metrics = linear_ppo_loss(
        hidden, weight, target, old, torch.tensor([advantage], dtype=torch.float64)
    )
    assert metrics.clip_fraction == float(clipped)
    assert bool(torch.autograd.grad(loss, hidden)[0].any()) is not clipped


def test_first_minibatch_has_ratio_one():
    hidden, weight, bias, target = naive.make(200, 16, 90, dtype=torch.float32)
    old = linear_logprobs(hidden, weight, target, bias=bias, temperature=0.7).logprobs
    metrics = linear_ppo_loss(
        hidden, weight, target, old, torch.randn(200), bias=bias, temperature=0.7
    ).metrics
    assert metrics.ratio_mean == 1 and metrics.ratio_max == 1 and metrics.k3 == 0


def test_sum_of_two_halves_with_a_shared_normalizer_is_the_whole():
    inputs, target, old, advantages, ref = problem(30, 4, 9)
    hidden, weight, bias = inputs

    def loss(rows, normalizer):
        return linear_ppo_loss(
            *(hidden[rows], weight, target[rows], old[rows], advantages[rows]),
            bias=bias,
            ref_logprobs=ref[rows],
            kl_coef=0.2,
            normalizer=normalizer,
        ).loss

    live = (target != -100).sum()
    halves = loss(slice(0, 10), live) + loss(slice(10, 30), live)
    whole = loss(slice(0, 30), None)
    torch.testing.assert_close(halves, whole)
    torch.testing.assert_close(naive.grads([halves], inputs), naive.grads([whole], inputs))


def test_second_derivative_is_an_error():
    inputs, target, old, advantages, _ = problem(4, 3, 5)
    loss = linear_ppo_loss(inputs[0], inputs[1], target, old, advantages).loss
    first = torch.autograd.grad(loss, inputs[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second-order"):
        first.sum().backward()


@pytest.mark.parametrize("normalizer", [0, -1.0, float("nan"), float("inf"), torch.ones(2)])
def test_bad_normalizer(normalizer):
    inputs, target, old, advantages, _ = problem(4, 3, 5)
    with pytest.raises(ValueError, match="normalizer"):
        linear_ppo_loss(*inputs[:2], target, old, advantages, normalizer=normalizer)


def test_kl_needs_a_reference():
    inputs, target, old, advantages, _ = problem(4, 3, 5)
    with pytest.raises(ValueError, match=r"ref_logprobs must be given.*0\.1"):
        linear_ppo_loss(*inputs[:2], target, old, advantages, kl_coef=0.1)


@pytest.mark.parametrize("workspace", [None, 0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("kind", ["old", "ref", "both", "minus infinity"])
def test_one_row_far_off_leaves_the_others_their_step(kind, advantage, workspace):
    """Log ratios beyond 88 overflow float32: the loss of the formula is inf, or NaN by 0 * inf."""
    inputs, target, old, advantages, ref = problem(12, 5, 11, dtype=torch.float32)
    row = int((target != -100).nonzero()[0])
    advantages[row] = advantage
    clean = old.clone(), ref.clone()
    if kind in ("old", "both"):
        old[row] -= 200
    if kind in ("ref", "both"):
        ref[row] += 200
    if kind == "minus infinity":
        old[row] = -torch.inf
    options = {"ref_logprobs": ref, "kl_coef": 0.1, "workspace_bytes": workspace}

    def step(rows=slice(None), **bound):
        of_rows = (target[rows], old[rows], advantages[rows])
        kwargs = {**options, "ref_logprobs": options["ref_logprobs"][rows], "normalizer": 7.0}
        loss, metrics = linear_ppo_loss(inputs[0][rows], inputs[1], *of_rows, **kwargs, **bound)
        return loss, metrics, naive.grads([loss], inputs[:2])

    if advantage == 0:
        assert not step()[0].isfinite() and not step()[2][1].isfinite().all()
    loss, metrics, gradients = step(max_log_ratio=20.0)
    live = int((target != -100).sum())
    assert loss.isfinite() and all(m.isfinite() for m in metrics)
    torch.testing.assert_close(metrics.bounded_fraction, torch.tensor(1 / live))
    others = torch.arange(12) != row
    _, _, (d_hidden, _) = step(others)
    torch.testing.assert_close(gradients[0][others], d_hidden[others])
    if kind in ("both", "minus infinity"):
        old, options["ref_logprobs"] = clean
        assert step(max_log_ratio=20.0)[1].bounded_fraction == 0
