"""What every vocabulary operation takes in the same way, with every backend."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import s2srm_kernels as kernels
from s2srm_kernels.lm_head import head as lm_head
from tests.kernels import naive

pytestmark = pytest.mark.usefixtures("backend")


def _ppo(hidden, weight, target, **options):
    rows = torch.linspace(-4, -2, target.numel(), dtype=torch.float64).view(target.shape)
    return kernels.linear_ppo_loss(hidden, weight, target, rows, rows + 3, **options)[:1]


def _loss(hidden, weight, target, **options):
    return [kernels.linear_cross_entropy(hidden, weight, target, **options)]


def _losses(hidden, weight, target, **options):
    return _loss(hidden, weight, target, reduction="none", **options)


DIFFERENTIABLE = {
    "logprobs": kernels.linear_logprobs,
    "cross_entropy": _loss,
    "losses": _losses,
    "ppo_loss": _ppo,
}
EVERY = {**DIFFERENTIABLE, "token_stats": kernels.linear_token_stats}
differentiable = pytest.mark.parametrize("op", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
every = pytest.mark.parametrize("op", EVERY.values(), ids=EVERY)


@every
@pytest.mark.parametrize("shape", [(2, 3, 2), (1, 12), (12, 1), (0, 3)], ids=str)
def test_leading_dimensions(op, shape):
    *inputs, target = naive.make(12, 5, 11)
    hidden, weight, bias = inputs
    n = torch.Size(shape).numel()
    flat = op(hidden[:n], weight, target[:n], bias=bias)
    shaped = op(hidden[:n].view(*shape, 5), weight, target[:n].view(shape), bias=bias)
    for ours, theirs in zip(shaped, flat, strict=True):
        assert ours.shape == (shape if theirs.dim() else ())
        assert torch.equal(ours.flatten(), theirs.flatten())
    if op is not kernels.linear_token_stats:
        ours, theirs = (naive.grads([x.flatten() for x in y], inputs) for y in (shaped, flat))
        torch.testing.assert_close(ours, theirs)


def test_leading_dimensions_of_everything_else():
    *inputs, target = naive.make(12, 5, 11)
    hidden, weight, _ = inputs
    rows, ids = torch.rand(12, dtype=torch.float64), torch.arange(24).view(12, 2) % 11
    cube = functools.partial(torch.Tensor.view, hidden, 3, 4, 5)
    report, flat_report = kernels.SkipReport(), kernels.SkipReport()
    ours = kernels.linear_logprobs(
        cube(), weight, target.view(3, 4), extra_ids=ids.view(3, 4, 2), skip_mass=0.1,
        skip_report=report,
    )  # fmt: skip
    theirs = kernels.linear_logprobs(
        hidden, weight, target, extra_ids=ids, skip_mass=0.1, skip_report=flat_report
    )
    assert torch.equal(ours.extra_logprobs.flatten(0, 1), theirs.extra_logprobs)
    assert torch.equal(report.mass.flatten(), flat_report.mass)
    weighted = kernels.linear_cross_entropy(
        cube(), weight, target.view(3, 4), row_weight=rows.view(3, 4)
    )
    assert torch.equal(
        weighted, kernels.linear_cross_entropy(hidden, weight, target, row_weight=rows)
    )
    seeds = torch.arange(12)
    tokens = kernels.linear_sample(cube(), weight, seeds.view(3, 4), seeds.view(3, 4)).tokens
    assert torch.equal(tokens.flatten(), kernels.linear_sample(hidden, weight, seeds, seeds).tokens)


@every
def test_rows_of_another_leading_shape(op):
    hidden, weight, _, target = naive.make(12, 5, 11, bias=False)
    with pytest.raises(ValueError, match=r"\(3, 4, 5\): pass hidden.flatten\(0, -2\).*\(3, 4\)"):
        op(hidden.view(3, 4, 5), weight, target.view(4, 3))


@differentiable
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_narrow_hidden_with_a_float32_head_is_widened(op, dtype):
    hidden, weight, bias, target = naive.make(20, 7, 30, dtype=torch.float32)
    narrow = hidden.detach().to(dtype).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    ours = list(op(narrow, weight, target, bias=bias))
    theirs = list(op(wide, weight, target, bias=bias))
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    gradients = naive.grads(ours, (narrow, weight, bias))
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
    expected = naive.grads(theirs, (wide, weight, bias))
    expected[0] = expected[0].to(dtype)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize(
    ("hidden", "weight"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_other_pairs_of_dtypes_are_an_error(hidden, weight):
    with pytest.raises(ValueError, match=r"weight must have hidden's dtype .* or float32"):
        kernels.linear_logprobs(
            torch.ones(3, 4, dtype=hidden), torch.ones(5, 4, dtype=weight), torch.arange(3)
        )


@every
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_a_known_number_of_live_rows_changes_nothing(op, ignored):
    hidden, weight, bias, target = naive.make(40, 5, 11, ignored=ignored)
    num_live = int((target != -100).sum())
    assert ignored or num_live == 40
    plain = op(hidden, weight, target, bias=bias)
    known = op(hidden, weight, target, bias=bias, num_live=num_live)
    assert all(torch.equal(x, y) for x, y in zip(known, plain, strict=True))
    if op is not kernels.linear_token_stats:
        inputs = (hidden, weight, bias)
        assert all(map(torch.equal, naive.grads(known, inputs), naive.grads(plain, inputs)))


class _Waits(TorchDispatchMode):
    """Names of what would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "masked_select"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@every
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_a_known_number_of_live_rows_waits_for_nothing(op, ignored, backend, monkeypatch):
    """A CUDA graph could hold the call: nothing is read but options, which lie on the CPU."""
    hidden, weight, bias, target = naive.make(40, 5, 11, ignored=ignored)
    num_live = int((target != -100).sum())
    read = []
    tolist = torch.Tensor.tolist

    def spied(tensor):
        if tensor.dtype != torch.float64 or tensor.dim() != 1 or len(tensor) > 8:
            read.append(tuple(tensor.shape))
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", spied)
    kernels.linear_logprobs(hidden, weight, target)
    assert read == [(3,)]  # what live_rows reads
    read.clear()
    with _Waits() as forward:
        outputs = op(hidden, weight, target, bias=bias, num_live=num_live)
    assert not forward.seen
    if op is not kernels.linear_token_stats:
        with _Waits() as backward:
            sum(o.sum() for o in outputs).backward()
        # Of a loss whose gradients are made: its factor, by the backends to which that is free.
        looks = op in (_loss, _ppo) and backend != "triton"
        assert backward.seen == ["_local_scalar_dense"] * looks
    assert not read


@pytest.mark.parametrize("num_live", [-1, 6, 2.0])
def test_bad_num_live(num_live):
    with pytest.raises(ValueError, match=r"num_live must .*got"):
        _loss(torch.ones(5, 4), torch.ones(9, 4), torch.zeros(5, dtype=torch.int64),
              num_live=num_live)  # fmt: skip


def test_num_live_that_is_wrong():
    hidden, weight, target = torch.ones(5, 4), torch.ones(9, 4), torch.tensor([1, 2, -100, 3, 4])
    for num_live in (0, 3, 5):
        with pytest.raises(ValueError, match=f"num_live is {num_live}, not the number of live"):
            _loss(hidden, weight, target, num_live=num_live)
    target[1] = 9
    with pytest.raises(ValueError, match=r"a target is neither in \[0, 9\) nor"):
        _loss(hidden, weight, target, num_live=4)


def test_live_rows_of_a_known_number_have_shapes_without_data():
    target = torch.empty(7, dtype=torch.int64, device="meta")
    assert lm_head.live_rows(target, -100, 9, 4).shape == (4,)
    assert lm_head.live_rows(target, -100, 9, 7).shape == (7,)


@differentiable
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_main_grad(op, dtype):
    """Added in the buffer's dtype, twice for two backwards; autograd has none for the weight."""
    hidden, weight, bias, target = naive.make(20, 7, 30, dtype=torch.float32)
    outputs = list(op(hidden, weight, target, bias=bias))
    d_hidden, d_weight, d_bias = naive.grads(outputs, (hidden, weight, bias))
    main_grad = torch.ones(30, 7, dtype=dtype)
    for count in (1, 2):
        outputs = list(op(hidden, weight, target, bias=bias, main_grad=main_grad))
        g = torch.Generator().manual_seed(0)
        upstream = [
            torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype)
            for o in outputs
            if o.requires_grad
        ]
        torch.autograd.backward([o for o in outputs if o.requires_grad], upstream)
        torch.testing.assert_close(main_grad, (1 + count * d_weight).to(dtype))
    assert weight.grad is None
    torch.testing.assert_close([hidden.grad, bias.grad], [2 * d_hidden, 2 * d_bias])
    frozen = torch.zeros(30, 7)
    out = op(hidden, weight.detach(), target, bias=bias, main_grad=frozen)
    sum(o.sum() for o in out).backward()
    assert not frozen.any()


@pytest.mark.parametrize(
    ("main_grad", "message"),
    [
        (torch.zeros(3, 4), r"main_grad must have weight's shape \(9, 4\), got \(3, 4\)"),
        (torch.zeros(9, 4).long(), "main_grad must have one of"),
        (torch.zeros(9, 4, requires_grad=True), "main_grad requires a gradient"),
        ([0.0], "main_grad must be a torch.Tensor"),
    ],
    ids=str,
)
def test_bad_main_grad(main_grad, message):
    with pytest.raises(ValueError, match=message):
        _loss(torch.ones(5, 4), torch.ones(9, 4), torch.zeros(5).long(), main_grad=main_grad)


def test_two_names_of_the_group():
    hidden, weight, _, target = naive.make(9, 5, 13, bias=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        one, other = (
            kernels.linear_logprobs(hidden, weight, target, **{name: group}).logprobs
            for name in ("vocab_group", "process_group")
        )
        assert torch.equal(one, other)
        with pytest.raises(ValueError, match="vocab_group and process_group mean the same"):
            kernels.linear_logprobs(hidden, weight, target, vocab_group=group, process_group=group)
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match="vocab_group must be a ProcessGroup or None, got 'v'"):
        kernels.linear_logprobs(hidden, weight, target, vocab_group="v")
