"""The bugs that other implementations of these operations had, each looked for in all of ours."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from s2srm_kernels import (
    dispatch,
    linear_cross_entropy,
    linear_logprobs,
    linear_ppo_loss,
    linear_token_stats,
)
from s2srm_kernels.lm_head import reference
from s2srm_kernels.options import pack_options
from tests.kernels import naive

pytestmark = pytest.mark.usefixtures("backend")

HEADS = [{}, {"softcap": 2.5, "temperature": 0.8}]


def _ppo(function, hidden, weight, target, **kwargs):
    g = torch.Generator().manual_seed(11)
    n = target.shape[0]
    old, advantages, ref = torch.randn(3, n, generator=g, dtype=torch.float64).to(hidden.dtype)
    shift = -math.log(weight.shape[0])
    options = {"ref_logprobs": ref + shift, "kl_coef": 0.1, "entropy_coef": 0.05}
    return [function(hidden, weight, target, old + shift, advantages, **options, **kwargs)[0]]


def _smoothed(function, hidden, weight, target, **kwargs):
    return [
        function(
            hidden, weight, target, reduction="none", label_smoothing=0.1, z_loss=0.01, **kwargs
        )
    ]


# name -> (ours, the definition), each returning a list of differentiable outputs
OPS = {
    "logprobs": (
        lambda *a, **k: list(linear_logprobs(*a, **k)),
        lambda *a, **k: list(naive.logprobs(*a, **k)),
    ),
    "cross_entropy": (
        lambda *a, **k: [linear_cross_entropy(*a, **k)],
        lambda *a, **k: [naive.cross_entropy(*a, **k)],
    ),
    "cross_entropy_none": (
        lambda *a, **k: _smoothed(linear_cross_entropy, *a, **k),
        lambda *a, **k: _smoothed(naive.cross_entropy, *a, **k),
    ),
    "ppo_loss": (
        lambda *a, **k: _ppo(linear_ppo_loss, *a, **k),
        lambda *a, **k: _ppo(naive.ppo_loss, *a, **k),
    ),
}
each_op = pytest.mark.parametrize("op", OPS)


def compare(op, hidden, weight, bias, target, rtol=1e-9, **head):
    """Values and gradients under random upstream gradients."""
    ours, theirs = (f(hidden, weight, target, bias=bias, **head) for f in OPS[op])
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    inputs = (hidden, weight, bias)
    torch.testing.assert_close(
        naive.grads(ours, inputs), naive.grads(theirs, inputs), rtol=rtol, atol=rtol
    )


@each_op
@pytest.mark.parametrize("v", [1, 2, 127, 129, 300, 1280])
def test_phantom_columns(op, v):
    """V that fills no tile: columns that are not there have no mass, even if all logits are low."""
    hidden, weight, bias, target = naive.make(9, 6, v, seed=1)
    with torch.no_grad():
        bias -= 40
    compare(op, hidden, weight, bias, target)


@each_op
@pytest.mark.parametrize("needs", [(i & 1, i & 2, i & 4) for i in range(1, 8)], ids=str)
def test_every_combination_of_frozen_inputs(op, needs):
    """A frozen trunk with a trainable head, and the reverse."""
    inputs = naive.make(9, 6, 20)
    *tensors, target = inputs
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(bool(need))
    compare(op, *tensors, target)


def _places(name, **given):
    """The arguments of an operator in their order; None where nothing is given."""
    schema = getattr(torch.ops.s2srm, name).default._schema
    unknown = given.keys() - {argument.name for argument in schema.arguments}
    assert not unknown, unknown
    return [given.get(argument.name) for argument in schema.arguments]


def test_gradients_that_are_not_needed_are_not_made():
    hidden, weight, bias, target = (t.detach() for t in naive.make(9, 6, 20))
    head = {"hidden": hidden, "weight": weight, "bias": bias, "target": target}
    head |= {"ignore_index": -100, "needs": [True, False, False], "in_forward": True}
    options = {"temperature": 1.0, "softcap": None}
    smooth = pack_options(**options, label_smoothing=0.0, z_loss=0.0, skip_mass=0.0)
    clip = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "max_log_ratio": None}
    clip = pack_options(**options, **clip, kl_coef=0.0, entropy_coef=0.0)
    rows = {"old_logprobs": target.double(), "advantages": target.double()}
    arguments = {
        "linear_cross_entropy": {"options": smooth, "reduction": "sum", "skips": False},
        "linear_ppo_loss": {"options": clip, "with_entropy": True, "entropy_gradient": False},
    }
    arguments["linear_ppo_loss"] |= rows
    for name, own in arguments.items():
        places = _places(name, **head, **own, owned=False)
        *_, d_hidden, d_weight, d_bias = getattr(torch.ops.s2srm, name)(*places)
        assert [g.numel() for g in (d_hidden, d_weight, d_bias)] == [54, 0, 0], name


@each_op
def test_offsets_beyond_int32(op):
    """Rows 2**31 elements apart; only the pages that are touched are ever backed by memory."""
    storage = torch.empty(2**31 + 8, dtype=torch.float16)
    hidden = storage.as_strided((2, 4), (2**31, 1))
    hidden.copy_(torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]]))
    weight = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).half()
    target = torch.tensor([3, 5])
    far = OPS[op][0](hidden, weight, target)
    near = OPS[op][0](hidden.contiguous(), weight, target)
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


@each_op
@pytest.mark.parametrize("n", [0, 5])
def test_no_live_row_gives_zero_and_zero_gradients(op, n):
    hidden, weight, bias, target = naive.make(n, 6, 20)
    outputs = OPS[op][0](hidden, weight, torch.full_like(target, -100), bias=bias)
    assert not any(o.any() for o in outputs)
    for gradient, tensor in zip(
        naive.grads(outputs, (hidden, weight, bias)), (hidden, weight, bias), strict=True
    ):
        assert gradient.shape == tensor.shape and not gradient.any()


def test_no_live_row_in_metrics_and_statistics():
    hidden, weight, _, target = naive.make(5, 6, 20, bias=False)
    ignored = torch.full_like(target, -100)
    metrics = linear_ppo_loss(hidden, weight, ignored, torch.ones(5), torch.ones(5)).metrics
    assert [float(m) for m in metrics] == [0] * 7
    assert not any(field.any() for field in linear_token_stats(hidden, weight, ignored))
    assert linear_token_stats(hidden[:0], weight, ignored[:0]).rank.shape == (0,)


@each_op
def test_what_stands_in_ignored_rows_is_never_read(op):
    hidden, weight, bias, target = naive.make(12, 6, 20, seed=2)
    ignored = target == -100
    assert 0 < ignored.sum() < 12
    poisoned = hidden.detach().clone()
    poisoned[ignored] = torch.tensor([float("nan"), float("inf")] * 3, dtype=torch.float64)
    poisoned.requires_grad_()
    clean = OPS[op][0](hidden, weight, target, bias=bias)
    dirty = OPS[op][0](poisoned, weight, target, bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    of_clean = naive.grads(clean, (hidden, weight, bias))
    of_dirty = naive.grads(dirty, (poisoned, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(of_clean, of_dirty, strict=True))
    assert not of_dirty[0][ignored].any()


def test_nan_in_other_inputs_of_ignored_rows_is_never_read():
    hidden, weight, _, target = naive.make(12, 6, 20, seed=2, bias=False)
    poison = torch.where(target == -100, float("nan"), 0.5)
    clean = torch.full((12,), 0.5)
    options = {"ref_logprobs": poison, "kl_coef": 0.1}
    ours = linear_ppo_loss(hidden, weight, target, poison, poison, **options)
    theirs = linear_ppo_loss(hidden, weight, target, clean, clean, ref_logprobs=clean, kl_coef=0.1)
    assert torch.equal(ours.loss, theirs.loss) and ours.metrics == theirs.metrics
    assert torch.equal(
        naive.grads([ours.loss], [weight])[0], naive.grads([theirs.loss], [weight])[0]
    )
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(hidden, weight, target, row_weight=poison, reduction=reduction)
        assert loss.isfinite().all()
        assert all(g.isfinite().all() for g in naive.grads([loss], (hidden, weight)))


@each_op
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_common_offset_of_the_logits(op, offset):
    """float32 with logits that are exact at 1e4: p, entropy and gradients keep their digits."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randint(-2, 3, (20, 4), generator=g).float()
    weight = torch.randint(-1, 2, (30, 4), generator=g).float()
    target = torch.randint(0, 30, (20,), generator=g)
    bias = torch.full((30,), offset)

    def run(function, b, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
        outputs = function(*inputs, target, bias=b.to(dtype))
        keep = outputs[:2] if op == "logprobs" else outputs  # lse carries the offset
        return [*keep, *naive.grads(keep, inputs)]

    ours = run(OPS[op][0], bias, torch.float32)
    shift = 0 if op != "cross_entropy_none" else offset  # the z-loss depends on the offset
    exact = run(OPS[op][1], torch.full((30,), float(shift)), torch.float64)
    for a, b in zip(ours, exact, strict=True):
        scale = b.detach().abs().max()
        assert (a - b).abs().max() <= 3e-6 * max(1.0, float(scale))


@each_op
@pytest.mark.parametrize("p", [0.999, 0.99999])
def test_confident_targets(op, p):
    """p(target) near 1: the gradient 1 - p must not drown in the rounding of p."""
    v, d = 50, 8
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(v, d, generator=g, dtype=torch.float64)
    target = torch.randint(0, v, (16,), generator=g)
    hidden = torch.zeros(16, d, dtype=torch.float64)
    hidden[:, 0] = 1
    weight[:, 0] = 0
    one_hot = torch.eye(v, dtype=torch.float64)[target]
    # No two rows alike: of 16 equal ones the norm would be one rounding, which may be eager's luck.
    logit = math.log(p / (1 - p) * (v - 1)) + torch.linspace(0, 1, 16, dtype=torch.float64)
    hidden = torch.cat([hidden * 0.01, one_hot * logit[:, None]], dim=1)
    weight = torch.cat([weight, torch.eye(v, dtype=torch.float64)], dim=1)
    exact = leaf_run(OPS[op][1], hidden, weight, target, torch.float64)
    ours = leaf_run(OPS[op][0], hidden, weight, target, torch.float32)
    eager = leaf_run(OPS[op][1], hidden, weight, target, torch.float32)
    assert_within_twice_eager(ours, eager, exact)
    for a, b in zip(ours, exact, strict=True):  # eager's own error is up to 6e-8 / (1 - p)
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


def leaf_run(function, hidden, weight, target, dtype):
    """Outputs and gradients in `dtype`, for the same random upstream gradients."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
    outputs = function(*inputs, target)
    return [*outputs, *naive.grads(outputs, inputs)]


def assert_within_twice_eager(ours, eager, exact):
    """Relative Frobenius error <= 2 x eager's in the same dtype, with one rounding for free."""
    for a, b, c in zip(ours, eager, exact, strict=True):
        norm = c.double().norm().clamp(min=1e-30)
        error, allowed = ((t.double() - c.double()).norm() / norm for t in (a, b))
        assert error <= 2 * allowed + torch.finfo(a.dtype).eps, (error, allowed)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(40, 33, 300), (129, 64, 1003)], ids=str)
def test_error_at_most_twice_eagers(op, shape, dtype):
    hidden, weight, _, target = naive.make(*shape, seed=5, bias=False, scale=0.5)
    hidden, weight = (t.detach().to(dtype).double() for t in (hidden, weight))
    exact = leaf_run(OPS[op][1], hidden, weight, target, torch.float64)
    eager = leaf_run(OPS[op][1], hidden, weight, target, dtype)
    ours = leaf_run(OPS[op][0], hidden, weight, target, dtype)
    assert_within_twice_eager(ours, eager, exact)
    half = dtype is not torch.float32
    assert all(
        t.dtype == (dtype if half and i >= len(ours) - 2 else torch.float32)
        for i, t in enumerate(ours)
    )


@each_op
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_near_uniform_softmax(op, head):
    """No entry may be skipped for being small: together they are everything."""
    hidden, weight, bias, target = naive.make(20, 8, 4000, seed=6, scale=1e-3)
    with torch.no_grad():
        weight += 0.5
    compare(op, hidden, weight, bias, target, **head)


@each_op
def test_non_contiguous_inputs(op):
    hidden, weight, bias, target = naive.make(14, 7, 23, seed=7)
    strided = (
        hidden.detach().t().contiguous().t().requires_grad_(),
        weight.detach().repeat(1, 2)[:, :7].requires_grad_(),
        bias.detach().repeat_interleave(2)[::2].requires_grad_(),
    )
    assert not any(t.is_contiguous() for t in strided)
    target2 = target.repeat_interleave(2)[::2]
    ours = OPS[op][0](strided[0], strided[1], target2, bias=strided[2])
    theirs = OPS[op][1](hidden, weight, target, bias=bias)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        naive.grads(ours, strided), naive.grads(theirs, (hidden, weight, bias))
    )


@each_op
@pytest.mark.parametrize("value", [20, 10**12, -1, -101])
def test_target_out_of_range_names_the_row(op, value):
    hidden, weight, _, target = naive.make(9, 6, 20, bias=False, ignored=0.3)
    target[6] = value
    with pytest.raises(ValueError, match=rf"target\[6\] is {value}.*\[0, 20\)"):
        OPS[op][0](hidden, weight, target)


@each_op
@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_mixed_dtypes(op, amp_dtype):
    hidden, weight, _, target = naive.make(9, 6, 20, bias=False, dtype=torch.float32)
    mixed = (hidden.detach().to(amp_dtype).requires_grad_(), weight)
    with torch.autocast("cpu", dtype=amp_dtype):
        ours = OPS[op][0](*mixed, target)
    explicit = [t.detach().to(amp_dtype).requires_grad_() for t in (hidden, weight)]
    theirs = OPS[op][0](*explicit, target)
    assert all(
        torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(ours, theirs, strict=True)
    )
    d_hidden, d_weight = naive.grads(ours, mixed)
    assert (d_hidden.dtype, d_weight.dtype) == (amp_dtype, torch.float32)
    assert torch.equal(d_weight.to(amp_dtype), naive.grads(theirs, explicit)[1])


@each_op
def test_autocast_leaves_float64_alone(op):
    hidden, weight, _, target = naive.make(9, 6, 20, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = OPS[op][0](hidden, weight, target)
    outside = OPS[op][0](hidden, weight, target)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def _off_the_boundary(matrix):
    """The same values, every row one element past a 16-byte boundary or at an odd distance."""
    wide = matrix.new_zeros(matrix.shape[0], matrix.shape[1] + 2)
    wide[:, 1:-1] = matrix
    return wide[:, 1:-1]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", ["logprobs", "cross_entropy_none"])
@pytest.mark.parametrize(
    ("dtype", "d", "v"),
    [
        # Rows off a 16-byte boundary, in hidden, weight, logits: MKL's choice where not on Intel.
        *[(torch.float32, 67, 501), (torch.float64, 67, 501), (torch.float64, 64, 501)],
        *[(torch.float64, 67, 512), (torch.float64, 1, 2)],
        # With two threads a BLAS splits a long inner dimension by the shape of the product.
        (torch.float32, 2048, 3001),
        # With two threads torch splits the sum of one row of 2**15 and more.
        (torch.float64, 5, 40_001),
    ],
    ids=str,
)
def test_a_row_is_the_same_bits_in_any_batch(op, dtype, d, v, threads, set_threads):
    set_threads(threads)
    n = 640 if d * v < 10**5 else 140
    hidden, weight, bias, target = naive.make(n, d, v, dtype=dtype, ignored=0.2, seed=8)
    live = int((target != -100).nonzero()[-1])

    def run(rows, place=lambda matrix: matrix):
        h = place(hidden.detach()[rows]).requires_grad_()
        outputs = OPS[op][0](h, weight, target[rows], bias=bias)
        upstream = [torch.linspace(-1, 1, n, dtype=dtype)[rows] for _ in outputs]
        return [*outputs, *torch.autograd.grad(outputs, h, upstream)]

    whole = run(torch.arange(n))
    rows = torch.arange(n)
    for part in (rows[live : live + 1], rows[n // 6 : n // 3], rows[1:], rows.flip(0)):
        again = run(part, _off_the_boundary if len(part) > 1 else torch.clone)
        assert all(torch.equal(a[part], b) for a, b in zip(whole, again, strict=True))


def test_a_row_is_the_same_bits_wherever_the_weight_lies(set_threads):
    """In a larger tensor, at an odd offset, transposed: copies of one model agree."""
    set_threads(2)
    hidden, weight, bias, target = naive.make(200, 66, 130, seed=8)
    hidden, weight = hidden.detach(), weight.detach()
    stats = linear_token_stats(hidden, weight, target, bias=bias)
    for same in (_off_the_boundary(weight), weight.t().contiguous().t()):
        assert torch.equal(same, weight) and same.stride() != weight.stride()
        again = linear_token_stats(hidden, same, target, bias=bias)
        assert all(torch.equal(a, b) for a, b in zip(stats, again, strict=True))


@each_op
def test_many_chunks_equal_one(op, monkeypatch):
    hidden, weight, bias, target = naive.make(700, 6, 20, seed=9)
    outputs = OPS[op][0](hidden, weight, target, bias=bias, impl="reference")
    gradients = naive.grads(outputs, (hidden, weight, bias))
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1)
    chunked = OPS[op][0](hidden, weight, target, bias=bias, impl="reference")
    torch.testing.assert_close(chunked, outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        naive.grads(chunked, (hidden, weight, bias)), gradients, rtol=1e-11, atol=1e-11
    )


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class _LargestTensor(TorchDispatchMode):
    """The most elements that any operation under it returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_no_tensor_of_all_logits(monkeypatch):
    """Measured inside the reference itself, forward and backward."""
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 2**15)
    n, d, v = 1000, 4, 100
    hidden, weight, _, target = naive.make(n, d, v, bias=False, ignored=0)
    hidden, weight = hidden.detach(), weight.detach()
    options = {"temperature": 2.0, "softcap": 5.0}
    smooth = pack_options(**options, label_smoothing=0.1, z_loss=0.1, skip_mass=0.0)
    plain = pack_options(**options, skip_mass=0.0)
    head = {"hidden": hidden, "weight": weight, "target": target, "ignore_index": -100}
    head["needs"] = [True, True, False]
    engine = reference.ReferenceEngine()

    def run(name, **own):
        return dispatch._BODIES[name](engine, *_places(name, **head, **own))

    with _LargestTensor() as largest:
        made = {"reduction": "mean", "skips": False, "in_forward": True, "owned": False}
        run("linear_cross_entropy", options=smooth, **made)
        run("linear_token_stats", options=pack_options(**options))
        rows, _, _, residual, live, *_ = run(
            "linear_logprobs", options=plain, with_entropy=True, skips=False
        )
        upstream = {f"grad_{name}": rows for name in ("logprobs", "entropy", "lse")}
        run("linear_logprobs_backward", options=plain, residual=residual, live=live, **upstream)
    assert 0 < largest.numel <= 2**15 < n * v
