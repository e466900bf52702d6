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
    {"row_weight": True, "kl_coef": 0.2, "entropy_coef": 0.1},
    {"dual_clip": 1.1},
    {"dual_clip": torch.tensor(1.3), "clip_high": 0.05, "row_weight": True},
    {"clip_low": None},
    {"clip_low": None, "clip_high": None, "kl_coef": 0.1},
    {"cu_seqlens": True, "clip_low": 0.02, "clip_high": 0.02},
    {"cu_seqlens": True, "row_weight": True, "kl_coef": 0.2, "clip_low": 0.01, "clip_high": 0.01},
    {"cu_seqlens": True, "max_log_ratio": 0.1, "dual_clip": 1.05},
]


def problem(n, d, v, seed=8, dtype=torch.float64):
    """Ratios on both sides of the clip range, advantages of both signs."""
    hidden, weight, bias, target = naive.make(n, d, v, seed=seed, dtype=dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logp = naive.logprobs(hidden, weight, target, bias=bias)[0]
    noise = torch.randn(3, n, generator=g, dtype=torch.float64).to(dtype)
    return (hidden, weight, bias), target, logp + 0.5 * noise[0], noise[1], logp + 0.3 * noise[2]


def given(options, n):
    """The options with the tensors of n rows that they stand for."""
    options = dict(options)
    if "row_weight" in options:
        options["row_weight"] = torch.linspace(-0.5, 2, n, dtype=torch.float64)
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor([0, n // 3, n // 3, n // 2, n])
    return options


def level(options):
    return {"ratio_level": "sequence"} if "cu_seqlens" in options else {}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options):
    inputs, target, old, advantages, ref = problem(6, 3, 7)
    options = {**given(options, 6), **level(options)}

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
    kwargs = {"bias": bias, "ref_logprobs": ref, **given(options, shape[0])}
    loss, metrics = linear_ppo_loss(*args, **kwargs, **level(options))
    their_loss, their_metrics = naive.ppo_loss(*args, **kwargs)
    torch.testing.assert_close(loss, their_loss)
    torch.testing.assert_close(tuple(metrics), tuple(m.detach() for m in their_metrics))
    clips = options.get("clip_low", 0) is not None and "max_log_ratio" not in options
    assert not clips or 0 < metrics.clip_fraction < 1 or shape[0] < 10
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


def test_ratios_of_sequences_are_gspos():
    """One advantage for each sequence, and the mean over sequences of their means (equation 5)."""
    inputs, target, old, _, _ = problem(20, 4, 9)
    hidden, weight, bias = inputs
    cu = torch.tensor([0, 6, 20])
    per_sequence = torch.tensor([1.5, -0.7], dtype=torch.float64)
    lengths = torch.stack([(target[:6] != -100).sum(), (target[6:] != -100).sum()])
    advantages, counts = (t.repeat_interleave(cu.diff()) for t in (per_sequence, lengths))
    ours = linear_ppo_loss(
        *(hidden, weight, target, old, advantages),
        **{"bias": bias, "row_weight": 1 / counts.double(), "normalizer": 2},
        **{"ratio_level": "sequence", "cu_seqlens": cu, "clip_low": 3e-4, "clip_high": 4e-4},
    ).loss
    logp = naive.logprobs(hidden, weight, target, bias=bias)[0]
    difference = (logp - old).masked_fill(target == -100, 0)
    ratio = torch.stack([difference[:6].sum(), difference[6:].sum()]).div(lengths).exp()
    clipped = ratio.clamp(1 - 3e-4, 1 + 4e-4)
    theirs = -torch.minimum(ratio * per_sequence, clipped * per_sequence).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(naive.grads([ours], inputs), naive.grads([theirs], inputs))


def test_a_sequence_that_is_far_off_leaves_the_others_their_step():
    inputs, target, old, advantages, _ = problem(12, 5, 11)
    old[0] = -torch.inf
    target[0] = 3
    options = {"ratio_level": "sequence", "max_log_ratio": 1.0, "normalizer": 1.0}
    cu = torch.tensor([0, 4, 12])
    whole = linear_ppo_loss(*inputs[:2], target, old, advantages, cu_seqlens=cu, **options)
    assert whole.metrics.bounded_fraction > 0 and whole.loss.isfinite()
    part = linear_ppo_loss(
        *(inputs[0][4:], inputs[1], target[4:], old[4:], advantages[4:]),
        **{"cu_seqlens": torch.tensor([0, 8]), **options},
    )
    ours, theirs = (naive.grads([x.loss], inputs[:1])[0][4:] for x in (whole, part))
    torch.testing.assert_close(ours, theirs)


def test_without_entropy():
    inputs, target, old, advantages, _ = problem(30, 5, 11)
    args = (*inputs[:2], target, old, advantages)
    with_it, without = linear_ppo_loss(*args), linear_ppo_loss(*args, with_entropy=False)
    assert without.metrics.entropy is None
    torch.testing.assert_close(without.loss, with_it.loss)
    torch.testing.assert_close(
        tuple(without.metrics._replace(entropy=with_it.metrics.entropy)), tuple(with_it.metrics)
    )
    torch.testing.assert_close(
        naive.grads([without.loss], inputs[:2]), naive.grads([with_it.loss], inputs[:2])
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"with_entropy": False, "entropy_coef": 0.1}, r"entropy_coef must be 0 .*with_entropy"),
        ({"dual_clip": 1.0}, r"dual_clip must be a number in \(1, "),
        ({"ratio_level": "word"}, "ratio_level must be one of .*'word'"),
        ({"ratio_level": "sequence"}, "cu_seqlens must be given with ratio_level 'sequence'"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens must be given .* with no other"),
        ({"ratio_level": "sequence", "cu_seqlens": torch.tensor([0, 3])}, r"end .* 4, got"),
        ({"row_weight": torch.ones(4).long()}, "row_weight must have one of .*int64"),
        ({"row_weight": torch.ones(4, requires_grad=True)}, "row_weight requires a gradient"),
    ],
    ids=str,
)
def test_bad_variant(options, message):
    inputs, target, old, advantages, _ = problem(4, 3, 5)
    with pytest.raises(ValueError, match=message):
        linear_ppo_loss(*inputs[:2], target, old, advantages, **options)
