"""The CPU's engine: statistics, gradients in every order of its passes, the same bits always."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s2srm_kernels import dispatch, linear_cross_entropy, linear_logprobs, linear_token_stats
from s2srm_kernels.lm_head.engine import SKIP_COLUMNS, SKIP_ROWS, Upstream
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.lm_head.statistics import merge
from tests.kernels import naive

_REASON = dispatch.load("cpp", "cpu")
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

# One row; one tile of columns and one column more; widths around a vector, a panel, a block of
# sums; no width; several groups of packed rows; spans of many tiles and of less than one.
SHAPES = [
    *[(1, 1, 1), (1, 5, 257), (7, 17, 3), (65, 129, 256), (300, 72, 515), (130, 700, 40)],
    *[(5, 0, 300), (2100, 3, 300), (20, 4, 9000), (25000, 2, 300)],
]
HEADS = [{}, {"softcap": 2.5, "temperature": 0.7}]
WORKSPACES = {"in_place": None, "chunks": 64 * 515 * 8, "recompute": 1}
NEEDS = [True, True, True]


@pytest.fixture(autouse=True)
def poisoned():
    """Whatever is left unwritten in an output or a workspace is a NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _head(hidden, weight, bias, target, softcap=None, temperature=1.0):
    tensors = [None if t is None else t.detach() for t in (hidden, weight, bias)]
    return Head(*tensors, target, softcap, temperature, -100, None)


def _engines():
    return dispatch.engine_of("cpp"), dispatch.engine_of("reference")


def _upstream(num_rows, dtype, seed=3):
    g = torch.Generator().manual_seed(seed)
    return Upstream(*torch.randn(4, num_rows, generator=g, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_in_float64_equal_the_reference(shape, head):
    problem = _head(*naive.make(*shape, seed=shape[0], ignored=0.2), **head)
    ours, theirs = _engines()
    target = theirs.target_logits(problem)
    torch.testing.assert_close(ours.target_logits(problem), target, rtol=1e-12, atol=1e-12)
    packed, tiles = ours.statistics(problem, target - 1e-9, True)
    expected, expected_tiles = theirs.statistics(problem, target - 1e-9, True)
    torch.testing.assert_close(packed, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tiles, expected_tiles, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_in_float64_equal_the_reference_in_every_order(shape, head, workspace):
    problem = _head(*naive.make(*shape, seed=shape[1], ignored=0.2), **head)
    if problem.num_live == 0:
        problem = _head(*naive.make(*shape, seed=shape[1], ignored=0.0), **head)
    upstream = _upstream(problem.num_live, torch.float64)
    results = []
    for engine in _engines():
        if workspace == "recompute":
            statistics = merge(engine.statistics(problem, None, False)[0], problem)
            results.append(engine.gradients(problem, statistics, upstream, NEEDS, None))
        else:
            _, gradients = engine.statistics_with_gradients(
                problem,
                lambda _, rows: upstream.map(lambda t: t[rows]),
                NEEDS,
                WORKSPACES[workspace],
            )
            results.append(gradients)
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "needs", [[True, False, False], [False, True, False], [False] * 2 + [True]]
)
def test_a_gradient_that_is_not_needed_is_empty_and_the_others_are_unchanged(needs):
    problem = _head(*naive.make(70, 33, 300))
    engine, _ = _engines()
    upstream = _upstream(problem.num_live, torch.float64)
    statistics = merge(engine.statistics(problem, None, False)[0], problem)
    every = engine.gradients(problem, statistics, upstream, NEEDS, None)
    some = engine.gradients(problem, statistics, upstream, needs, None)
    for whole, part, needed in zip(every, some, needs, strict=True):
        assert torch.equal(part, whole) if needed else part.shape == (0,)


def test_float32_errs_at_most_twice_as_much_as_eager():
    for shape, scale in (((40, 700, 1000), 0.1), ((300, 64, 5000), 0.3)):
        problem = naive.make(*shape, dtype=torch.float32, ignored=0.1, scale=scale)
        exact = [t.detach().double().requires_grad_() for t in problem[:3]]
        results = []
        for function, inputs in (
            (linear_logprobs, problem[:3]),
            (naive.logprobs, problem[:3]),
            (naive.logprobs, exact),
        ):
            options = {"impl": "cpp"} if function is linear_logprobs else {}
            outputs = list(function(*inputs[:2], problem[3], bias=inputs[2], **options))
            results.append([*outputs, *naive.grads(outputs, inputs)])
        for ours, eager, truth in zip(*results, strict=True):
            allowed = 2 * (eager.double() - truth).abs().max()
            assert (ours.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_widened_and_gradients_rounded_once(dtype):
    hidden, weight, bias, target = naive.make(90, 150, 600, dtype=torch.float64, scale=0.3)
    halves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in halves]
    ours = list(linear_logprobs(*halves[:2], target, bias=halves[2], impl="cpp"))
    theirs = list(naive.logprobs(*exact[:2], target, bias=exact[2]))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.double(), their, rtol=2e-6, atol=2e-5)
    gradients = naive.grads(ours, halves), naive.grads(theirs, exact)
    for our, their in zip(*gradients, strict=True):
        assert our.dtype == dtype
        torch.testing.assert_close(our.double(), their, rtol=torch.finfo(dtype).eps, atol=2e-5)


def test_a_row_has_the_same_bits_alone_and_in_any_batch_and_thread_count(threads):
    hidden, weight, bias, target = naive.make(333, 300, 1100, dtype=torch.float32, ignored=0)

    def run(rows, num_threads):
        threads(num_threads)
        h = hidden.detach()[rows].requires_grad_()
        stats = linear_token_stats(h, weight, target[rows], bias=bias, softcap=9.0, impl="cpp")
        out = linear_logprobs(h, weight, target[rows], bias=bias, softcap=9.0, impl="cpp")
        (d_hidden,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), h)
        return (*stats, *(o.detach() for o in out), d_hidden)

    whole = run(slice(None), 1)
    for rows in (slice(0, 1), slice(200, 201), slice(120, 270), slice(17, 333)):
        for num_threads in (1, 2, 3):
            for part, every in zip(run(rows, num_threads), whole, strict=True):
                assert torch.equal(part, every[rows])


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_gradients_have_the_same_bits_with_any_number_of_threads(workspace, threads):
    hidden, weight, bias, target = naive.make(150, 200, 1300, dtype=torch.float32)
    results = []
    for num_threads in (1, 2, 3):
        threads(num_threads)
        loss = linear_cross_entropy(
            *(hidden, weight, target),
            bias=bias,
            label_smoothing=0.1,
            workspace_bytes=WORKSPACES[workspace],
            impl="cpp",
        )
        results.append([loss, *torch.autograd.grad(loss, (hidden, weight, bias))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_target_logit_is_the_same_bits_as_the_logit_in_the_tile():
    hidden, weight, bias, target = naive.make(140, 700, 1000, dtype=torch.float32, ignored=0)
    for options in HEADS:
        problem = _head(hidden, weight, bias, target, **options)
        engine, _ = _engines()
        logits = engine.target_logits(problem)
        packed, _ = engine.statistics(problem, logits, False)
        assert torch.equal(logits, packed[:, 4])
        best = _head(hidden, weight, bias, packed[:, 5].long(), **options)
        logits = engine.target_logits(best)
        packed, _ = engine.statistics(best, logits, False)
        assert torch.equal(logits, packed[:, 0]) and not packed[:, 6].any()


def test_blocks_that_are_not_live_add_nothing():
    n, d, v = 2 * SKIP_ROWS + 50, 70, 3 * SKIP_COLUMNS + 7
    problem = _head(*naive.make(n, d, v, ignored=0))
    upstream = _upstream(n, torch.float64)
    live = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) < 0.5  # one block too many
    live[1], live[:, 2] = False, False
    results = []
    for engine in _engines():
        statistics = merge(engine.statistics(problem, None, False)[0], problem)
        results.append(engine.gradients(problem, statistics, upstream, NEEDS, live))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-11)
    assert not results[0][0][SKIP_ROWS : 2 * SKIP_ROWS].any()
    assert not results[0][1][2 * SKIP_COLUMNS : 3 * SKIP_COLUMNS].any()


def test_strided_inputs():
    hidden, weight, bias, target = naive.make(50, 40, 300)
    wide = torch.full((300, 64), torch.nan, dtype=torch.float64)
    wide[:, :40] = weight.detach()
    expected = linear_token_stats(hidden, weight, target, bias=bias, impl="cpp")
    for h, w in (
        (hidden, wide[:, :40]),
        (hidden.t().contiguous().t(), weight.t().contiguous().t()),
        (hidden.repeat_interleave(2, dim=0)[::2], weight),
    ):
        stats = linear_token_stats(h, w, target, bias=bias, impl="cpp")
        assert all(torch.equal(a, b) for a, b in zip(stats, expected, strict=True))


def test_nan_and_infinite_logits():
    hidden, weight, bias, target = naive.make(20, 8, 600, dtype=torch.float32, ignored=0)
    hidden, weight, bias = (t.detach() for t in (hidden, weight, bias))
    clean = linear_logprobs(hidden, weight, target, bias=bias, impl="cpp")
    broken = hidden.clone()
    broken[3, 2] = torch.nan
    out = linear_logprobs(broken, weight, target, bias=bias, impl="cpp")
    assert out.logprobs[3].isnan() and out.lse[3].isnan()
    others = torch.arange(20) != 3
    assert torch.equal(out.logprobs[others], clean.logprobs[others])
    suppressed = torch.full_like(bias, -torch.inf)
    suppressed[[5, 300]] = 0  # whole tiles of -inf, and a first tile that has one logit
    ours = linear_token_stats(hidden, weight, target, bias=suppressed, impl="cpp")
    theirs = linear_token_stats(hidden, weight, target, bias=suppressed, impl="reference")
    torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=1e-5, atol=1e-6)
    assert ours.entropy.isfinite().all() and (ours.lse.exp() > 0).all()


def _ulps(function, dtype, low, high):
    x = torch.linspace(low, high, 400_001, dtype=dtype)
    out = torch.empty_like(x)
    torch.ops.s2srm.cpu_elementwise(x, function, out)
    exact = getattr(x.double(), function)()
    rounded = exact.to(dtype)
    step = (torch.nextafter(rounded.abs(), torch.full_like(x, torch.inf)) - rounded.abs()).double()
    return ((out.double() - exact.double()).abs() / step).max()


def test_exp_and_tanh_err_by_about_a_unit_in_the_last_place():
    # In float64 torch's own functions are the yardstick, which may err by as much.
    assert _ulps("exp", torch.float32, -110, 88.7) < 1.1
    assert _ulps("exp", torch.float64, -760, 709.7) < 2.1
    for reach in (1e-30, 1e-3, 1.0, 40.0):
        assert _ulps("tanh", torch.float32, -reach, reach) < 1.4
        assert _ulps("tanh", torch.float64, -reach, reach) < 2.4
    x = torch.tensor([0.0, -torch.inf, torch.nan, -torch.inf])
    out = torch.empty_like(x)
    torch.ops.s2srm.cpu_elementwise(x, "exp", out)
    assert out[[0, 1]].tolist() == [1, 0] and out[2].isnan()
    torch.ops.s2srm.cpu_elementwise(x, "tanh", out)
    assert out[[0, 1]].tolist() == [0, -1] and out[2].isnan()


def _run(code, **environment):
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("kernels", ["baseline", "avx2", "avx512"])
def test_the_kernels_of_every_instruction_set_agree(kernels):
    code = """
import torch
from tests.kernels import naive
from s2srm_kernels import linear_cross_entropy, linear_token_stats
for shape in [(1, 5, 257), (65, 129, 256), (150, 72, 515)]:
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-10)):
        *inputs, target = naive.make(*shape, dtype=dtype, ignored=0.1, scale=0.3)
        options = dict(bias=inputs[2], softcap=2.0, label_smoothing=0.1)
        ours = linear_cross_entropy(*inputs[:2], target, **options, impl="cpp")
        theirs = naive.cross_entropy(*inputs[:2], target, **options)
        ours, theirs = ([o, *naive.grads([o], inputs)] for o in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        stats = [linear_token_stats(*inputs[:2], target, impl=i) for i in ("cpp", "reference")]
        torch.testing.assert_close(*map(tuple, stats), rtol=tolerance, atol=tolerance)
"""
    done = _run(code, S2SRM_CPU_KERNELS=kernels)
    if "run on this processor" in done.stderr:
        pytest.skip(f"this processor does not run {kernels}")
    assert done.returncode == 0, done.stderr


def test_an_unknown_instruction_set_is_refused():
    done = _run(
        "import torch; from s2srm_kernels import linear_token_stats as f;"
        "f(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64), impl='cpp')",
        S2SRM_CPU_KERNELS="avx1024",
    )
    assert "ValueError" in done.stderr and "avx1024" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("call", ["stats", "cross_entropy", "logprobs"])
def test_peak_memory_is_within_64_mib_and_the_gradients(call):
    # Logits of 480 MiB. The first call is for what torch allocates once.
    code = f"""
import torch
from s2srm_kernels import linear_cross_entropy, linear_logprobs, linear_token_stats
def run(n, d, v):
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    target = torch.randint(0, v, (n,))
    open("/proc/self/clear_refs", "w").write("5")
    before = kib("VmRSS")
    if {call!r} == "stats":
        linear_token_stats(hidden, weight, target, impl="cpp")
    elif {call!r} == "cross_entropy":
        linear_cross_entropy(hidden, weight, target, impl="cpp").backward()
    else:
        out = linear_logprobs(hidden, weight, target, impl="cpp")
        (out.logprobs + out.entropy).sum().backward()
    return (kib("VmHWM") - before) / 2**10
def kib(name):
    return int(next(x for x in open("/proc/self/status") if x.startswith(name)).split()[1])
run(8, 8, 300)
print(run(480, 8, 2**18))
"""
    done = _run(code, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    gradients = 8 * (480 + 2**18) * 4 / 2**20
    assert float(done.stdout) < 64 + (0 if call == "stats" else gradients)
