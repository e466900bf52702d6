"""How programs call the operations: checkpoints, transforms, meta tensors, threads, options."""

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import s2srm_kernels as kernels
from tests.kernels import naive

pytestmark = pytest.mark.usefixtures("backend")
N = 9
ROWS = torch.linspace(-4, -3, N)
HIDDEN, WEIGHT, _, TARGET = naive.make(N, 16, 37, dtype=torch.float32, bias=False)
CU = torch.tensor([0, 4, N])

LOSSES = {
    "mean": lambda h, w: kernels.linear_cross_entropy(h, w, TARGET),
    "recomputed": lambda h, w: kernels.linear_cross_entropy(h, w, TARGET, workspace_bytes=0),
    "none": lambda h, w: kernels.linear_cross_entropy(h, w, TARGET, reduction="none").sum(),
    "logprobs": lambda h, w: sum(x.sum() for x in kernels.linear_logprobs(h, w, TARGET)),
    "lse": lambda h, w: kernels.linear_logprobs(h, w, TARGET).lse.sum(),
    "ppo": lambda h, w: (
        kernels.linear_ppo_loss(h, w, TARGET, ROWS, ROWS + 4, entropy_coef=0.1).loss
    ),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def _saves_operators(ctx, op, *args, **kwargs):
    ours = "s2srm" in str(op)
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "again": {"use_reentrant": False},
    "without rng": {"use_reentrant": False, "preserve_rng_state": False},
    "to the end": {"use_reentrant": False, "early_stop": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, _saves_operators),
    },
    "reentrant": {"use_reentrant": True},
}


@each_loss
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_around_a_loss(loss, options, frozen):
    def gradients(run):
        h, w = (t.detach().clone().requires_grad_() for t in (HIDDEN, WEIGHT))
        w.requires_grad_(not frozen)
        run(h * 1, w).backward()
        return [t.grad for t in (h, w) if t.requires_grad]

    plain = gradients(loss)
    again = gradients(lambda h, w: checkpoint(loss, h, w, **options))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@each_loss
def test_a_gradient_that_was_handed_out_belongs_to_the_caller(loss):
    value = loss(HIDDEN, WEIGHT)
    first = torch.autograd.grad(value, [HIDDEN, WEIGHT], retain_graph=True)
    expected = [g.clone() for g in first]
    for g in first:
        g.mul_(0.5)
    second = torch.autograd.grad(value, [HIDDEN, WEIGHT], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(second, expected, strict=True))
    for g in second:
        g.zero_()
    last = torch.autograd.grad(value, [HIDDEN, WEIGHT])
    assert all(torch.equal(a, b) for a, b in zip(last, expected, strict=True))


def test_the_only_backward_makes_no_second_copy():
    """A gradient of the weight may be the largest tensor there is."""
    loss = kernels.linear_cross_entropy(HIDDEN, WEIGHT, TARGET)
    kept = loss.grad_fn.saved_tensors[1]
    assert torch.autograd.grad(loss, WEIGHT)[0].data_ptr() == kept.data_ptr()


@each_loss
def test_batched_upstream_gradients(loss):
    upstream = torch.tensor([1.0, -2.0, 0.5])
    value = loss(HIDDEN, WEIGHT)
    batched = torch.autograd.grad(
        value, [HIDDEN, WEIGHT], upstream, is_grads_batched=True, retain_graph=True
    )
    for i, one in enumerate(upstream):
        alone = torch.autograd.grad(value, [HIDDEN, WEIGHT], one, retain_graph=True)
        torch.testing.assert_close([g[i] for g in batched], list(alone))


def _forward_mode(loss):
    with forward_ad.dual_level():
        loss(forward_ad.make_dual(HIDDEN.detach(), torch.ones_like(HIDDEN)), WEIGHT)


@each_loss
@pytest.mark.parametrize(
    "transform",
    [
        lambda loss: torch.func.grad(loss)(HIDDEN, WEIGHT),
        lambda loss: torch.func.vmap(loss, (0, None))(torch.stack([HIDDEN, HIDDEN]), WEIGHT),
        lambda loss: torch.func.jvp(lambda h: loss(h, WEIGHT), (HIDDEN,), (HIDDEN,)),
        _forward_mode,
    ],
    ids=["grad", "vmap", "jvp", "forward mode"],
)
def test_transforms_are_one_clear_line(loss, transform):
    with pytest.raises(NotImplementedError, match=r"^linear_\w+ .*backward\(\) or torch\.autograd"):
        transform(loss)


@each_loss
def test_a_jit_trace_is_one_clear_line(loss):
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace .*use torch\.export"):
        torch.jit.trace(loss, (HIDDEN.detach(), WEIGHT.detach()), check_trace=False)


@each_loss
def test_export(loss):
    class Program(torch.nn.Module):
        def forward(self, h, w):
            return loss(h, w)

    h, w = HIDDEN.detach(), WEIGHT.detach()
    exported = torch.export.export(Program(), (h, w), strict=False).module()
    assert torch.equal(exported(2 * h, w), loss(2 * h, w))


def test_options_that_were_first_seen_in_a_mode():
    """They are kept between calls, and inference mode and fake tensors make another kind."""

    def run(value):
        h = HIDDEN.detach().clone().requires_grad_()
        loss = kernels.linear_cross_entropy(h, WEIGHT, TARGET, temperature=value)
        return loss, *torch.autograd.grad(loss, h)

    with torch.inference_mode():
        kernels.linear_cross_entropy(HIDDEN, WEIGHT, TARGET, temperature=0.625)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        h, w, target = (fake.from_tensor(t.detach()) for t in (HIDDEN, WEIGHT, TARGET))
        kernels.linear_cross_entropy(h, w, target, temperature=0.375)
    for value in (0.625, 0.375):
        expected = run(torch.tensor(value))
        assert all(torch.equal(a, b) for a, b in zip(run(value), expected, strict=True))


def test_meta_tensors_have_shapes():
    h, w, target, rows, cu = (t.detach().to("meta") for t in (HIDDEN, WEIGHT, TARGET, ROWS, CU))
    h.requires_grad_()
    w.requires_grad_()
    with torch.autocast("cpu"):
        loss = kernels.linear_cross_entropy(h, w, target)
    assert loss.shape == () and loss.is_meta
    shapes = [g.shape for g in torch.autograd.grad(loss, [h, w])]
    assert shapes == [HIDDEN.shape, WEIGHT.shape]
    assert kernels.linear_cross_entropy(h, w, target, reduction="none").shape == (N,)
    assert all(x.shape == (N,) and x.is_meta for x in kernels.linear_logprobs(h, w, target))
    assert kernels.linear_token_stats(h, w, target).rank.dtype == torch.int64
    ppo = kernels.linear_ppo_loss(h, w, target, rows, rows)
    assert all(x.shape == () for x in (ppo.loss, *ppo.metrics))
    assert kernels.gae(rows, rows, cu).returns.shape == (N,)
    assert kernels.token_rewards(target, target, cu).divergence_index.shape == (2,)


def test_defaults_of_the_program_change_nothing():
    expected = [loss(HIDDEN, WEIGHT) for loss in LOSSES.values()]
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        ours = [loss(HIDDEN, WEIGHT) for loss in LOSSES.values()]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, torch.tensor])
def test_numbers_of_every_kind(kind):
    expected = kernels.linear_cross_entropy(HIDDEN, WEIGHT, TARGET, temperature=0.5, softcap=4.0)
    ours = kernels.linear_cross_entropy(
        HIDDEN, WEIGHT, TARGET, temperature=kind(0.5), softcap=kind(4.0), skip_mass=kind(0.0)
    )
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("value", [1e-50, 1e50, torch.tensor(1e-30), np.float64("nan"), "1", [1.0]])
@pytest.mark.parametrize("name", ["temperature", "softcap"])
def test_numbers_that_vanish_or_are_none(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a number"):
        kernels.linear_logprobs(HIDDEN, WEIGHT, TARGET, **{name: value})


def test_an_option_that_asks_for_a_gradient():
    learned = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match=r"temperature requires a gradient.*detach"):
        kernels.linear_logprobs(HIDDEN, WEIGHT, TARGET, temperature=learned)
    with pytest.raises(ValueError, match=r"temperature must be a number or 0-d.*\(2,\)"):
        kernels.linear_logprobs(HIDDEN, WEIGHT, TARGET, temperature=torch.ones(2))


def test_tensors_that_lie_elsewhere():
    with pytest.raises(ValueError, match=r"weight has layout torch.sparse_coo.*to_dense\(\)"):
        kernels.linear_cross_entropy(HIDDEN, WEIGHT.detach().to_sparse(), TARGET)


_AT_ONCE = """
import threading, torch, warnings
warnings.simplefilter("error")
import s2srm_kernels as kernels
from s2srm_kernels import dispatch
start, failures = threading.Barrier(16), []

def call():
    start.wait()
    try:
        CALL
    except BaseException as error:
        failures.append(error)

threads = [threading.Thread(target=call) for _ in range(16)]
[t.start() for t in threads]; [t.join() for t in threads]
assert not failures, failures[0]
"""


def test_the_first_calls_may_come_from_several_threads(backend):
    call = f"kernels.linear_cross_entropy(*torch.randn(2, 5, 4), torch.arange(5), impl={backend!r})"
    if backend == "triton":  # its interpreter runs one kernel at a time
        call = "assert dispatch.load('triton') is None"
    code = _AT_ONCE.replace("CALL", call)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
