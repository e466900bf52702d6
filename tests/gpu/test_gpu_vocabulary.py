"""The vocabulary operations on the GPU: every backend against float64 on the device."""

from __future__ import annotations

import pytest
import torch

import s2srm_kernels
from benchmarks import checking
from benchmarks.definitions import VOCABULARY_OPS
from benchmarks.measure import outputs_and_gradients
from benchmarks.problems import IGNORE_INDEX, normal_problem
from benchmarks.products import BOTH, modes_of
from benchmarks.providers.base import OUTPUTS
from benchmarks.providers.ours import Ours, unavailable
from benchmarks.shapes import Shape

IMPLS = ("triton", "cpp", "reference")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Multiples of nothing, less than a tile, one column above a tile, more rows than a chunk has.
SHAPES = (
    Shape("odd", 300, 72, 1000),
    Shape("small", 5, 16, 7),
    Shape("one above", 129, 128, 4097),
    Shape("unaligned", 67, 33, 515),
    Shape("long", 4500, 64, 1100),
)
ODD = SHAPES[0]
OPTIONS = (
    {"softcap": 2.0},
    {"temperature": 0.7},
    {"bias": True},
    {"bias": True, "softcap": 3.0, "temperature": 1.4},
)
CROSS_ENTROPY_OPTIONS = (
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"row_weight": True},
    {"label_smoothing": 0.2, "z_loss": 1e-3, "row_weight": True, "softcap": 2.0},
)
PPO_OPTIONS = (
    {"kl_coef": 0.3},
    {"entropy_coef": 0.2},
    {"kl_coef": 0.1, "entropy_coef": -0.05, "temperature": 1.3},
)


def make(shape, dtype, device, ignored=0.3, seed=0, **options):
    problem = normal_problem(shape, dtype, device, ignored, seed)
    generator = torch.Generator(device).manual_seed(seed + 1)
    if options.pop("bias", False):
        bias = torch.randn(shape.vocab_size, generator=generator, device=device)
        problem.bias = bias.to(dtype).requires_grad_()
    if options.pop("row_weight", False):
        problem.row_weight = torch.rand(shape.num_rows, generator=generator, device=device)
    for name, value in options.items():
        setattr(problem, name, value)
    return problem


def available(op, impl, device):
    reason = unavailable(op, impl, device)
    if reason is not None:
        if impl == "triton" and device.type == "cuda":
            pytest.fail(reason)
        pytest.skip(reason)


def hold_to_the_rule(op, problem, outputs, gradients):
    truth = checking.find_truth(op, problem, tuple(outputs), bool(gradients))
    errors = checking.compare(op, problem, truth.exact, outputs, gradients)
    dtype = problem.hidden.dtype
    bad = {
        name: (error, truth.eager_errors[name])
        for name, error in errors.items()
        if error > checking.limit(name, truth.eager_errors[name], dtype)
    }
    assert not bad, f"(error, eager's): {bad}"


def run(op, impl, problem, recompute=False):
    provider = Ours(impl, 0 if recompute else None)
    backward = BOTH in modes_of(op)
    return outputs_and_gradients(provider.build(op, problem), problem, backward)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize("op", VOCABULARY_OPS)
def test_error_is_at_most_twice_eagers(op, shape, dtype, impl, device):
    available(op, impl, device)
    problem = make(shape, dtype, device)
    hold_to_the_rule(op, problem, *run(op, impl, problem))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("op", VOCABULARY_OPS)
def test_options_of_the_head(op, options, impl, device):
    available(op, impl, device)
    problem = make(ODD, torch.bfloat16, device, **options)
    hold_to_the_rule(op, problem, *run(op, impl, problem))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("op", "options"),
    [("linear_cross_entropy", options) for options in CROSS_ENTROPY_OPTIONS]
    + [("linear_ppo_loss", options) for options in PPO_OPTIONS],
    ids=str,
)
def test_options_of_the_losses(op, options, impl, device):
    available(op, impl, device)
    problem = make(ODD, torch.bfloat16, device, **options)
    hold_to_the_rule(op, problem, *run(op, impl, problem))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("op", ("linear_cross_entropy", "linear_ppo_loss"))
def test_recompute_order(op, dtype, impl, device):
    available(op, impl, device)
    problem = make(SHAPES[4], dtype, device)
    hold_to_the_rule(op, problem, *run(op, impl, problem, recompute=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_losses_of_every_row_under_random_upstream_gradients(impl, device):
    available("linear_cross_entropy", impl, device)
    problem = make(ODD, torch.bfloat16, device, label_smoothing=0.1)

    def losses():
        made = s2srm_kernels.linear_cross_entropy(
            *(problem.hidden, problem.weight, problem.target),
            reduction="none",
            label_smoothing=problem.label_smoothing,
            impl=impl,
        )
        return {"losses": made}

    made = outputs_and_gradients(losses, problem, backward=True)
    assert not made[0]["losses"][problem.target == IGNORE_INDEX].any()
    hold_to_the_rule("linear_cross_entropy", problem, *made)


@pytest.mark.parametrize("impl", IMPLS)
def test_lse_is_differentiable_with_the_others(impl, device):
    available("linear_logprobs", impl, device)
    problem = make(ODD, torch.float32, device)

    def rows():
        made = s2srm_kernels.linear_logprobs(
            problem.hidden, problem.weight, problem.target, impl=impl
        )
        return made._asdict()

    made = outputs_and_gradients(rows, problem, backward=True)
    assert set(made[0]) == {"logprobs", "entropy", "lse"}
    hold_to_the_rule("linear_logprobs", problem, *made)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("op", VOCABULARY_OPS)
def test_two_runs_give_the_same_bits(op, recompute, impl, device):
    available(op, impl, device)
    problem = make(SHAPES[4], torch.bfloat16, device)
    if Ours(impl, 0 if recompute else None).refuses(op, problem, BOTH in modes_of(op)) is not None:
        pytest.skip("one order only")
    first, second = (run(op, impl, problem, recompute) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype, impl, device):
    available("linear_token_stats", impl, device)
    problem = make(SHAPES[4], dtype, device, ignored=0.0)

    def stats(rows):
        made = s2srm_kernels.linear_token_stats(
            problem.hidden[rows], problem.weight, problem.target[rows], impl=impl
        )
        return torch.stack([field.double() for field in made])

    everyone = stats(slice(None))
    for rows in (slice(0, 1), slice(777, 778), slice(3000, 3131), slice(4499, 4500)):
        assert torch.equal(stats(rows), everyone[:, rows]), rows


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", VOCABULARY_OPS)
def test_no_live_row(op, impl, device):
    available(op, impl, device)
    for num_rows in (0, 40):
        problem = make(Shape("none", num_rows, 16, 50), torch.bfloat16, device, ignored=0.0)
        problem.target = torch.full_like(problem.target, IGNORE_INDEX)
        outputs, gradients = run(op, impl, problem)
        for name, value in {**outputs, **gradients}.items():
            assert not value.any(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_rows_are_never_read(impl, device):
    available("linear_ppo_loss", impl, device)
    problem = make(ODD, torch.bfloat16, device)
    outputs, gradients = run("linear_ppo_loss", impl, problem)
    ignored = problem.target == IGNORE_INDEX
    with torch.no_grad():
        problem.hidden[ignored] = torch.nan
    problem.advantages[ignored] = torch.nan
    again, gradients_again = run("linear_ppo_loss", impl, problem)
    assert torch.equal(outputs["loss"], again["loss"])
    assert not gradients["hidden"][ignored].any()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_non_contiguous_inputs(impl, device):
    available("linear_cross_entropy", impl, device)
    problem = make(ODD, torch.bfloat16, device)
    _, expected = run("linear_cross_entropy", impl, problem)
    problem.hidden = problem.hidden.detach().t().contiguous().t().requires_grad_()
    wide = torch.cat([problem.weight.detach()] * 2, dim=1)[:, : ODD.hidden_size]
    problem.weight = wide.requires_grad_()
    assert not problem.hidden.is_contiguous()
    _, gradients = run("linear_cross_entropy", impl, problem)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_a_target_out_of_range_names_its_row(impl, device):
    available("linear_token_stats", impl, device)
    problem = make(ODD, torch.bfloat16, device, ignored=0.0)
    problem.target[123] = ODD.vocab_size
    with pytest.raises(ValueError, match=r"target\[123\] is 1000"):
        run("linear_token_stats", impl, problem)


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_trunk_and_frozen_head(impl, device):
    available("linear_ppo_loss", impl, device)
    problem = make(ODD, torch.bfloat16, device)
    _, expected = run("linear_ppo_loss", impl, problem)
    loss = Ours(impl).build("linear_ppo_loss", problem)
    for name, tensor in problem.inputs.items():
        for other in problem.inputs.values():
            other.requires_grad_(other is tensor)
        (gradient,) = torch.autograd.grad(loss()["loss"], [tensor], problem.upstream("loss"))
        assert checking.relative_error(gradient, expected[name]) < 1e-2, name


# Rows times columns, rows times width and columns times width beyond 2**31 elements.
@pytest.mark.parametrize(
    "shape",
    [
        Shape("N V", 20000, 16, 131072),
        Shape("N D", 270000, 8192, 256),
        Shape("V D", 64, 8320, 262144),
    ],
    ids=lambda s: s.name,
)
@pytest.mark.whole_gpu
@pytest.mark.parametrize("op", ("linear_token_stats", "linear_cross_entropy"))
def test_addresses_beyond_32_bits(op, shape, device):
    if device.type == "cpu" or torch.cuda.mem_get_info(device)[0] < 50 * 2**30:
        pytest.skip("needs 50 GiB of free GPU memory")
    available(op, "triton", device)
    problem = make(shape, torch.bfloat16, device)
    hold_to_the_rule(op, problem, *run(op, "triton", problem))


@pytest.mark.parametrize("impl", IMPLS)
def test_skipping_keeps_its_bound(impl, device):
    available("linear_logprobs", impl, device)
    problem = make(Shape("peaked", 700, 64, 4000), torch.bfloat16, device, ignored=0.0)
    # The targets of 128 rows lie in one tile of columns, and most of the mass lies there too.
    problem.target = torch.arange(700, device=device) // 128 * 512 + problem.target % 256
    with torch.no_grad():
        problem.hidden.copy_(problem.weight[problem.safe_target] * 24.0)
    upstream = problem.upstream("logprobs")

    def gradient(skip_mass):
        logprobs = s2srm_kernels.linear_logprobs(
            *(problem.hidden, problem.weight, problem.target), skip_mass=skip_mass, impl=impl
        ).logprobs
        return torch.autograd.grad(logprobs, [problem.hidden], upstream)[0].double()

    exact, skipped, skip_mass = gradient(0.0), gradient(0.05), 0.05
    largest = problem.weight.double().norm(dim=1).max()
    bound = upstream.abs().double() * skip_mass * largest
    rounding = 2**-7 * exact.norm(dim=1)
    assert ((exact - skipped).norm(dim=1) <= bound + rounding).all()
    assert not torch.equal(exact, skipped)


@pytest.mark.parametrize("impl", IMPLS)
def test_under_torch_compile(impl, device):
    available("linear_logprobs", impl, device)
    problem = make(ODD, torch.bfloat16, device)

    def objective(hidden, weight):
        made = s2srm_kernels.linear_logprobs(hidden, weight, problem.target, impl=impl)
        return (made.logprobs * problem.upstream("logprobs")).sum() - made.entropy.mean()

    inputs = [problem.hidden, problem.weight]
    expected = torch.autograd.grad(objective(*inputs), inputs)
    compiled = torch.compile(objective, fullgraph=True)
    for made, right in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert torch.equal(made, right)


def test_every_output_is_compared():
    assert set(OUTPUTS["linear_token_stats"]) == set(s2srm_kernels.TokenStats._fields)
