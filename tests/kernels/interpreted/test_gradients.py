"""Gradients of the Triton engine."""

import itertools

import pytest
import torch

from s2srm_kernels import linear_cross_entropy, linear_ppo_loss
from s2srm_kernels.lm_head.engine import SKIP_COLUMNS, SKIP_ROWS
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.statistics import merge
from s2srm_kernels.triton import configs, engine, problem
from tests.kernels import naive
from tests.kernels.interpreted.helpers import (
    HEADS,
    OURS,
    REFERENCE,
    assert_close,
    head_of,
    upstream_of,
)


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("terms", [(), ("lse",), ("entropy", "lse", "mean_logprob")], ids=str)
@pytest.mark.parametrize("shape", [(70, 33, 300), (5, 1, 2)], ids=str)
def test_both_orders_of_the_gradients(shape, terms, options):
    head = head_of(*shape, seed=1, **options)
    up = upstream_of(head, terms=terms)
    statistics = merge(REFERENCE.statistics(head, None, False)[0], head)
    needs = [True] * 3
    theirs = REFERENCE.gradients(head, statistics, up, needs, None)
    assert_close(OURS.gradients(head, statistics, up, needs, None), theirs, 1e-9)
    made, rows_first = OURS.statistics_with_gradients(
        head, lambda _, rows: up.map(lambda values: values[rows]), needs, None
    )
    assert_close(rows_first, theirs, 1e-9)
    for ours, wanted in zip(made[:-1], statistics[:-1], strict=True):
        assert_close(ours, wanted, 1e-9)


def test_many_chunks_equal_one(monkeypatch):
    """Chunks of 40 rows in one order, of 256 columns in the other."""
    head = head_of(150, 9, 700, seed=2, softcap=3.0)
    up = upstream_of(head)
    needs = [True] * 3

    def run():
        statistics, sums = OURS.statistics_with_gradients(
            head, lambda _, rows: up.map(lambda values: values[rows]), needs, None
        )
        return statistics, sums, OURS.gradients(head, statistics, up, needs, None)

    one = run()
    monkeypatch.setattr(engine, "_chunk_rows", lambda *_: 40)
    monkeypatch.setattr(engine, "MIN_CHUNK_COLUMNS", 1)
    monkeypatch.setattr(engine, "GRADIENT_CHUNK_BYTES", 1)
    many = run()
    assert all(torch.equal(a, b) for a, b in zip(one[0], many[0], strict=True))
    assert_close(many[1:], one[1:])


@pytest.mark.parametrize("needs", [(i & 1, i & 2, i & 4) for i in range(1, 8)], ids=str)
def test_only_what_is_needed_is_made(needs):
    head = head_of(20, 5, 40)
    up = upstream_of(head)
    statistics = merge(OURS.statistics(head, None, False)[0], head)
    whole = OURS.gradients(head, statistics, up, [True] * 3, None)
    _, rows_first = OURS.statistics_with_gradients(head, lambda *_: up, needs, None)
    for order in (OURS.gradients(head, statistics, up, needs, None), rows_first):
        for gradient, wanted, need in zip(order, whole, needs, strict=True):
            if need:
                assert_close(gradient, wanted)
            else:
                assert gradient.numel() == 0


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dead_blocks_add_nothing(needs, dtype, monkeypatch):
    """Three blocks of live rows, of which one is wholly dead, and three of columns."""
    head = head_of(420, 20, 700, dtype=dtype, seed=3)
    assert -(-head.num_live // SKIP_ROWS) == 3
    live = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    up = upstream_of(head)
    statistics = merge(OURS.statistics(head, None, False)[0], head)
    theirs = REFERENCE.gradients(head, statistics, up, needs, live)
    tolerance = 1e-9 if dtype == torch.float64 else 6e-3
    assert_close(OURS.gradients(head, statistics, up, needs, live), theirs, tolerance)
    monkeypatch.setattr(engine, "MIN_CHUNK_COLUMNS", SKIP_COLUMNS)
    monkeypatch.setattr(engine, "GRADIENT_CHUNK_BYTES", 1)
    assert_close(OURS.gradients(head, statistics, up, needs, live), theirs, tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("d", "v"), [(24, 300), (64, 256), (8, 1)])
def test_descriptors_give_the_bits_of_pointers(dtype, d, v, monkeypatch):
    head = head_of(70, d, v, dtype=dtype, seed=4)
    up = upstream_of(head)

    def run():
        targets = OURS.target_logits(head)
        packed, tiles = OURS.statistics(head, targets, True)
        statistics = merge(packed, head)
        live = torch.ones(1, -(-v // SKIP_COLUMNS), dtype=torch.bool)
        return [
            *(targets, packed, tiles),
            *OURS.gradients(head, statistics, up, [True] * 3, None),
            *OURS.gradients(head, statistics, up, [True] * 3, live),
            *OURS.statistics_with_gradients(head, lambda *_: up, [True] * 3, None)[1],
        ]

    assert not problem.Problem(head).tile("statistics").descriptors
    pointers = run()
    monkeypatch.setattr(configs, "DESCRIPTOR_FAMILIES", {configs.INTERPRETER})
    assert problem.Problem(head).tile("statistics").descriptors
    assert all(torch.equal(a, b) for a, b in zip(pointers, run(), strict=True))


def test_offsets_beyond_int32_in_the_weight():
    """Rows of the weight 2**31 elements apart, in both orders."""
    storage = torch.zeros(0, dtype=torch.float16)
    torch.use_deterministic_algorithms(False)  # or all 4 GiB would be filled
    storage = torch.empty(2**31 + 8, dtype=torch.float16)
    torch.use_deterministic_algorithms(True)
    weight = storage.as_strided((2, 4), (2**31, 1))
    weight.copy_(torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]]))
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).half()
    target = torch.tensor([0, 1, 1, 0, 1])

    def run(w):
        head = Head(hidden, w, None, target, None, 1.0, -100, None)
        up = upstream_of(head)
        statistics, sums = OURS.statistics_with_gradients(head, lambda *_: up, [True] * 3, None)
        again = OURS.gradients(head, statistics, up, [True] * 3, None)
        return [*statistics, *sums, *again]

    assert all(
        torch.equal(a, b) for a, b in zip(run(weight), run(weight.contiguous()), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gap", [20.0, 59.0, 61.0, 100.0, 3000.0])
def test_targets_far_below_the_maximum(dtype, gap):
    """What the rows-first order stores is relative to the target's logit, while that fits."""
    g = torch.Generator().manual_seed(2)
    hidden = torch.eye(8)[torch.arange(40) % 8].to(dtype)
    weight = torch.randint(-4, 5, (300, 8), generator=g).to(dtype)
    weight[:3] += gap
    target = torch.randint(0, 300, (40,), generator=g)
    head = Head(hidden, weight, None, target, None, 1.0, -100, None)
    exact = Head(hidden.double(), weight.double(), None, target, None, 1.0, -100, None)
    up = upstream_of(head, terms=("entropy", "lse"))
    ours = OURS.statistics_with_gradients(head, lambda *_: up, [True, True, False], None)[1]
    wide = up.map(lambda values: values.double())
    theirs = REFERENCE.statistics_with_gradients(exact, lambda *_: wide, [True, True, False], None)[
        1
    ]
    # What is stored is an exponential of up to 60, whose argument float32 rounds to 60 * 2**-24.
    bound = 4 * torch.finfo(dtype).eps + 60 * 2**-23
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert (a - b).abs().max() <= bound * b.abs().max()


def _losses(hidden, weight, target, bias, eager, **head):
    """Every loss with its gradients made in forward, with all of its terms."""
    g = torch.Generator().manual_seed(3)
    old, advantages, reference = torch.randn(3, len(target), generator=g) * 0.5
    old, reference = old - 5.7, reference - 5.7  # -log 300: ratios that float16 can hold
    row_weight = torch.rand(len(target), generator=g)
    smooth = {"label_smoothing": 0.1, "z_loss": 0.01, "row_weight": row_weight}
    ppo = {"ref_logprobs": reference, "kl_coef": 0.1, "entropy_coef": 0.2}
    common = (hidden, weight, target)
    if eager:
        to = hidden.dtype
        cast = {k: v.to(to) if torch.is_tensor(v) else v for k, v in {**smooth, **ppo}.items()}
        smooth = {k: cast[k] for k in smooth}
        ppo = {k: cast[k] for k in ppo}
        return [
            naive.cross_entropy(*common, reduction="sum", bias=bias, **smooth, **head),
            naive.ppo_loss(*common, old.to(to), advantages.to(to), bias=bias, **ppo, **head)[0],
        ]
    options = {"bias": bias, "impl": "triton", **head}
    return [
        linear_cross_entropy(*common, reduction="sum", **smooth, **options),
        linear_ppo_loss(*common, old, advantages, **ppo, **options).loss,
    ]


@pytest.mark.parametrize(
    ("dtype", "options", "workspace"),
    [
        (torch.float32, {}, None),
        (torch.float32, {"softcap": 5.0, "temperature": 0.7}, 1),
        (torch.bfloat16, {}, 1),
        (torch.bfloat16, {"softcap": 5.0, "temperature": 0.7}, None),
        (torch.float16, {}, None),
        (torch.float16, {"softcap": 5.0, "temperature": 0.7}, None),
    ],
    ids=str,
)
def test_losses_err_at_most_twice_as_much_as_eager(dtype, options, workspace, monkeypatch):
    """Both orders, all terms at once, against float64 on the same inputs."""
    if workspace is not None:
        monkeypatch.setattr(engine, "WORKSPACE_BYTES", workspace)
    hidden, weight, bias, target = naive.make(90, 40, 300, dtype=dtype, seed=6, scale=0.5)

    def run(to, eager):
        inputs = [t.detach().to(to).requires_grad_() for t in (hidden, weight, bias)]
        outputs = _losses(inputs[0], inputs[1], target, inputs[2], eager, **options)
        gradients = [torch.autograd.grad(o, inputs, retain_graph=True) for o in outputs]
        return [*(o.detach() for o in outputs), *itertools.chain.from_iterable(gradients)]

    exact, eager, ours = run(torch.float64, True), run(dtype, True), run(dtype, False)
    for a, b, e in zip(ours, eager, exact, strict=True):
        scale = float(e.norm())
        allowed = 2 * float((b.double() - e).norm()) + 2 * torch.finfo(torch.float32).eps * scale
        assert float((a.double() - e).norm()) <= allowed


@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_tiles_of_the_chips(family, dtype, monkeypatch):
    """The shapes that run on a GPU, on a problem that fills none of them."""
    tile_of = configs.logits_tile
    monkeypatch.setattr(configs, "DESCRIPTOR_FAMILIES", {configs.INTERPRETER})
    if family == "sm_80":
        monkeypatch.setattr(configs, "DESCRIPTOR_FAMILIES", set())
    monkeypatch.setattr(
        configs, "logits_tile", lambda kernel, _, *rest: tile_of(kernel, family, *rest)
    )
    head = head_of(180, 72, 300, dtype=dtype, seed=7, temperature=1.3)
    exact = head_of(180, 72, 300, dtype=torch.float64, seed=7, temperature=1.3)
    exact.hidden, exact.weight, exact.bias = (
        t.double() for t in (head.hidden, head.weight, head.bias)
    )
    up = upstream_of(head)
    wide = up.map(lambda values: values.double())
    live = torch.tensor([[True, False], [True, True]])
    statistics, sums = OURS.statistics_with_gradients(head, lambda *_: up, [True] * 3, None)
    wanted, exact_sums = REFERENCE.statistics_with_gradients(
        exact, lambda *_: wide, [True] * 3, None
    )
    for ours, theirs in zip(statistics[:5], wanted[:5], strict=True):
        assert_close(ours.double(), theirs, 2e-5)
    pairs = [(sums, exact_sums)]
    for blocks in (None, live):
        ours = OURS.gradients(head, statistics, up, [True] * 3, blocks)
        pairs.append((ours, REFERENCE.gradients(exact, wanted, wide, [True] * 3, blocks)))
    unit = max(torch.finfo(dtype).eps, 2e-6)
    for ours, theirs in pairs:
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() <= 2 * unit * b.abs().max()


def test_a_wide_softcap_in_float16_makes_the_logits_again(monkeypatch):
    """Stored exponentials would lose the logits that the softcap's slope needs."""
    head = head_of(30, 9, 50, dtype=torch.float16, softcap=30.0)
    up = upstream_of(head)
    monkeypatch.setattr(engine.Storage, "allocate", None)
    statistics, sums = OURS.statistics_with_gradients(head, lambda *_: up, [True] * 3, None)
    again = OURS.gradients(head, statistics, up, [True] * 3, None)
    assert all(a.dtype == torch.float32 for a in sums)
    assert_close([a.half() for a in sums], list(again), 2e-3)
