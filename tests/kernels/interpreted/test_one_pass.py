"""Cross-entropy and PPO in one pass over the vocabulary: exponentials relative to the target."""

import math

import pytest
import torch

from s2srm_kernels import linear_cross_entropy, linear_ppo_loss
from s2srm_kernels.lm_head.engine import Upstream, Wanted
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.statistics import merge
from s2srm_kernels.triton import engine, launch_backward, products
from tests.kernels import naive
from tests.kernels.interpreted.helpers import (
    HEADS,
    OURS,
    REFERENCE,
    assert_close,
    head_of,
    upstream_of,
)

LEAST = Wanted(maximum=False, entropy=False, mean=False)
WITH_ENTROPY = Wanted(maximum=False, entropy=True, mean=False)
NEEDS = [True] * 3


@pytest.fixture
def in_float64(monkeypatch):
    """The order of bfloat16 in a dtype whose rounding hides nothing."""
    monkeypatch.setattr(engine, "ONE_PASS_DTYPES", {torch.bfloat16, torch.float64})


@pytest.fixture(autouse=True)
def no_second_pass(monkeypatch):
    """Nothing here may fall back to the pass over the stored exponentials or the four products."""
    monkeypatch.setattr(launch_backward, "stored_gradients", None)
    monkeypatch.setattr(launch_backward, "logit_gradients", None)


def made(head, upstream, wanted=LEAST, needs=NEEDS, workspace=None):
    return OURS.statistics_with_gradients(
        head,
        lambda _, rows: upstream.map(lambda values: values[rows]),
        needs,
        workspace,
        wanted,
        proportional=True,
    )


def with_targets_at(shifts, n, v=300, d=24, seed=0):
    """bfloat16 hidden, weight, target: row i's target's logit is moved by shifts[i % len]."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.cat([torch.randn(n, d, generator=g) * 0.3, torch.eye(n)], dim=1)
    weight = torch.cat([torch.randn(v, d, generator=g) * 0.3, torch.zeros(v, n)], dim=1)
    target = torch.randperm(v, generator=g)[:n]
    shift = torch.tensor(shifts)[torch.arange(n) % len(shifts)]
    weight[target, d + torch.arange(n)] = shift
    return hidden.bfloat16(), weight.bfloat16(), target


def plain_head(hidden, weight, target):
    return Head(hidden, weight, None, target, None, 1.0, -100, None)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("terms", [(), ("lse",)], ids=str)
@pytest.mark.parametrize("shape", [(150, 9, 700), (5, 1, 2)], ids=str)
def test_gradients_and_statistics(shape, terms, options):
    head = head_of(*shape, seed=1, **options)
    up = upstream_of(head, terms=terms)
    wanted = merge(REFERENCE.statistics(head, None, False)[0], head)
    statistics, ours = made(head, up, WITH_ENTROPY)
    assert_close(ours, REFERENCE.gradients(head, wanted, up, NEEDS, None), 1e-9)
    for field in ("logprobs", "entropy", "lse", "target_logit"):
        assert_close(getattr(statistics, field), getattr(wanted, field), 1e-9)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("needs", [(i & 1, i & 2, i & 4) for i in range(1, 8)], ids=str)
def test_only_what_is_needed_is_made(needs):
    head = head_of(20, 5, 40)
    up = upstream_of(head, terms=())
    for ours, whole, need in zip(made(head, up, needs=needs)[1], made(head, up)[1], needs):  # noqa: B905
        assert_close(ours, whole) if need else None
        assert ours.numel() == (whole.numel() if need else 0)


@pytest.mark.usefixtures("in_float64")
def test_many_chunks_equal_one(monkeypatch):
    head = head_of(150, 9, 700, seed=2, softcap=3.0)
    up = upstream_of(head, terms=("lse",))
    one = made(head, up)
    monkeypatch.setattr(engine, "_chunk_rows", lambda *_: 40)
    many = made(head, up)
    assert all(torch.equal(a, b) for a, b in zip(one[0], many[0], strict=True))
    assert_close(many[1], one[1])


@pytest.mark.usefixtures("in_float64")
def test_rows_in_which_all_but_the_target_vanish():
    """dz_target alone, where the gradients of log p and lse are equal; nothing where they are 0."""
    head = head_of(40, 9, 70, seed=3)
    same = torch.linspace(-1, 1, head.num_live, dtype=torch.float64).masked_fill(
        torch.arange(head.num_live) % 3 == 0, 0
    )
    up = Upstream(logprobs=same, lse=same)
    statistics = merge(REFERENCE.statistics(head, None, False)[0], head)
    theirs = REFERENCE.gradients(head, statistics, up, NEEDS, None)
    ours = made(head, up)[1]
    assert_close(ours, theirs, 1e-6)
    zero = head.rows[same == 0]
    assert len(zero) and not ours[0][zero].any()


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize(
    "shifts",
    [[0.0], [math.log(1e-6) + 5], [math.log(1e4) + 6], [-40.0, 0.0, 15.0, -3000.0]],
    ids=["plain", "p = 1e-6", "p = 0.9999", "mixed"],
)
def test_losses_err_at_most_twice_as_much_as_eager(shifts, z_loss):
    hidden, weight, target = with_targets_at(shifts, 60)
    target[::7] = -100
    g = torch.Generator().manual_seed(1)
    advantages = torch.randn(len(target), generator=g)
    row_weight = torch.rand(len(target), generator=g)

    def run(dtype, eager):
        h, w = (t.to(dtype).requires_grad_() for t in (hidden, weight))
        old = naive.logprobs(hidden.double(), weight.double(), target)[0].to(
            dtype if eager else torch.float32
        )
        weights = row_weight.to(dtype) if eager else row_weight
        if eager:
            loss = naive.cross_entropy(h, w, target, row_weight=weights, z_loss=z_loss)
            ppo, metrics = naive.ppo_loss(h, w, target, old, advantages.to(dtype))
        else:
            loss = linear_cross_entropy(
                h, w, target, row_weight=weights, z_loss=z_loss, impl="triton"
            )
            ppo, metrics = linear_ppo_loss(h, w, target, old, advantages, impl="triton")
        gradients = [g for o in (loss, ppo) for g in torch.autograd.grad(o, (h, w))]
        return [loss.detach(), ppo.detach(), metrics[3].detach(), *gradients]

    exact = run(torch.float64, True)
    eager, ours = run(torch.bfloat16, True), run(torch.bfloat16, False)
    for a, b, e in zip(ours, eager, exact, strict=True):
        allowed = 2 * float((b.double() - e).norm()) + 2.0**-22 * float(e.norm())
        assert float((a.double() - e).norm()) <= allowed
        # And on its own: factors of two roundings.
        assert float((a.double() - e).norm()) <= 2.0**-7 * float(e.norm()) + 1e-6


def test_a_confident_row_keeps_its_digits():
    """1 - p of 1e-3 to 1e-12 in the gradient of hidden, each row against its own size."""
    hidden, weight, target = with_targets_at([12.0, 18.0, 24.0, 30.0, 33.0], 40)
    head, up = plain_head(hidden, weight, target), Upstream(torch.ones(40))
    exact = plain_head(hidden.double(), weight.double(), target)
    statistics, ours = made(head, up)
    theirs = REFERENCE.statistics_with_gradients(
        exact, lambda *_: Upstream(torch.ones(40, dtype=torch.float64)), NEEDS, None
    )
    assert float(theirs[0].logprobs.abs().min()) < 1e-11
    assert_close(statistics.logprobs.double() / theirs[0].logprobs, torch.ones(40).double(), 1e-5)
    error = (ours[0].double() - theirs[1][0]).norm(dim=1)
    assert (error <= 2.0**-6 * theirs[1][0].norm(dim=1)).all()


@pytest.mark.parametrize("gap", [20.0, 39.0, 41.0, 3000.0])
def test_targets_far_below_the_maximum(gap):
    """Of some rows: they are made again relative to their maximum, the others keep their bits."""
    hidden, weight, target = with_targets_at([0.0, 0.0, 0.0, -gap], 140)
    rows = torch.arange(140) % 4 != 3
    up = Upstream(torch.linspace(-2, 1, 140))
    statistics, ours = made(plain_head(hidden, weight, target), up, WITH_ENTROPY)
    exact = plain_head(hidden.double(), weight.double(), target)
    wide = up.map(lambda values: values.double())
    theirs, gradients = REFERENCE.statistics_with_gradients(exact, lambda *_: wide, NEEDS, None)
    for a, b in zip(ours[:2], gradients[:2], strict=True):
        assert float((a.double() - b).norm()) <= 2.0**-7 * float(b.norm())
    assert_close(statistics.logprobs.double(), theirs.logprobs, 1e-5)
    assert_close(statistics.entropy.double(), theirs.entropy, 3e-5)
    alone, near = made(plain_head(hidden[rows], weight, target[rows]), Upstream(up.logprobs[rows]))
    assert torch.equal(alone.logprobs, statistics.logprobs[rows])
    assert_close(near[0].float(), ours[0][rows].float(), 2.0**-8)


@pytest.mark.parametrize("bias", ["some", "the target's"])
def test_suppressed_tokens(bias):
    hidden, weight, target = with_targets_at([0.0, 2.0], 30)
    suppressed = torch.zeros(300).bfloat16()
    others = torch.ones(300, dtype=torch.bool).index_fill(0, target, False).nonzero().squeeze(1)
    suppressed[others[:40]] = -math.inf
    if bias == "the target's":
        suppressed[target[4]] = -math.inf

    def run(dtype):
        tensors = [t.to(dtype) for t in (hidden, weight, suppressed)]
        head = Head(*tensors, target, None, 1.0, -100, None)
        up = Upstream(torch.ones(30, dtype=head.dtype))
        if dtype == torch.bfloat16:
            return made(head, up)
        return REFERENCE.statistics_with_gradients(head, lambda *_: up, NEEDS, None)

    (statistics, ours), (theirs, gradients) = run(torch.bfloat16), run(torch.float64)
    assert_close(statistics.logprobs.double(), theirs.logprobs, 1e-5)
    for a, b in zip(ours, gradients, strict=True):
        assert a.isfinite().all()
        assert float((a.double() - b).norm()) <= 2.0**-7 * float(b.norm())


def test_a_row_is_the_same_bits_in_any_batch():
    hidden, weight, target = with_targets_at([0.0, 5.0, -60.0], 200)
    up = Upstream(torch.linspace(-2, 1, 200))
    whole, gradients = made(plain_head(hidden, weight, target), up, WITH_ENTROPY)
    for rows in (torch.arange(7, 8), torch.arange(40, 175), torch.arange(199, -1, -1)):
        head = plain_head(hidden[rows], weight, target[rows])
        statistics, part = made(head, Upstream(up.logprobs[rows]), WITH_ENTROPY)
        for a, b in zip(statistics, whole, strict=True):
            assert torch.equal(a, b[rows])
        # The product is the library's here: its own rounding, then one to bfloat16.
        assert_close(part[0].float(), gradients[0][rows].float(), 2.0**-8)


@pytest.mark.parametrize("value", [1.0, 3.0, -0.25])
def test_the_factor_of_backward(value):
    """Kept in bfloat16, scaled in place by the last backward alone, and not at all by 1."""
    hidden, weight, target = with_targets_at([0.0], 60)
    hidden.requires_grad_(), weight.requires_grad_()

    def gradients(loss, factor, **options):
        return torch.autograd.grad(loss, (hidden, weight), torch.tensor(factor), **options)

    loss = linear_cross_entropy(hidden, weight, target, impl="triton")
    once = gradients(loss, 1.0, retain_graph=True)
    kept = gradients(loss, value, retain_graph=True)
    last = gradients(loss, value)
    for a, b, c in zip(once, kept, last, strict=True):
        assert b.dtype == c.dtype == torch.bfloat16
        assert torch.equal(b, (a.float() * value).bfloat16())
        # The interpreter cuts off what a GPU rounds.
        assert_close(c.float(), b.float(), 2.0**-7)


def test_a_factor_of_one_writes_nothing():
    gradient = torch.tensor([1.0, math.nan, 3.0]).bfloat16()
    before = gradient.clone().view(torch.int16)
    launch_backward.scale_(gradient, torch.tensor(1.0))
    assert torch.equal(gradient.view(torch.int16), before)
    launch_backward.scale_(gradient, torch.tensor(2.0))
    assert gradient[0] == 2 and gradient[1].isnan() and gradient[2] == 6


def test_a_sum_where_no_product_can_be_added(monkeypatch):
    """torch.addmm with out_dtype is tried once on the device; without it, slab by slab."""
    g = torch.Generator().manual_seed(0)
    left, right, total = (torch.randn(*shape, generator=g) for shape in ((50, 8), (8, 9), (50, 9)))
    whole = total + left @ right
    monkeypatch.setattr(products, "_ADDED_ROWS", 16)
    products.add_by_slabs(left, right, total)
    assert_close(total, whole, 1e-6)

    def refuse(*_, **__):
        raise RuntimeError("out_dtype is not supported")

    products.adds_mixed.cache_clear()
    monkeypatch.setattr(torch, "addmm", refuse)
    assert not products.adds_mixed(torch.device("cpu"), torch.bfloat16)
    products.adds_mixed.cache_clear()
