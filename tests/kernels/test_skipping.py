"""Tile skipping: exact at 0, within its bound above, and what it reports is what it did."""

import pytest
import torch

from s2srm_kernels import SkipReport, linear_cross_entropy, linear_logprobs
from s2srm_kernels.lm_head.engine import SKIP_COLUMNS, SKIP_ROWS
from tests.kernels import naive

pytestmark = pytest.mark.usefixtures("backend")

V, D = 3 * SKIP_COLUMNS + 40, 16


def _peaked(n=300, seed=0):
    """Rows that put nearly all their mass on one tile, the same for neighbours."""
    hidden, weight, bias, target = naive.make(n, D, V, seed=seed, ignored=0.2)
    g = torch.Generator().manual_seed(seed)
    tile = torch.arange(n) // 150
    target = torch.where(
        target < 0, target, tile * SKIP_COLUMNS + torch.randint(0, 256, (n,), generator=g)
    )
    with torch.no_grad():
        for t in range(2):
            hidden[tile == t, t] += 12
            weight[t * SKIP_COLUMNS : (t + 1) * SKIP_COLUMNS, t] += 1.5
    return hidden, weight, bias, target


def _cross_entropy(reduction):
    def call(*args, **kwargs):
        return linear_cross_entropy(*args, reduction=reduction, **kwargs)

    return call


OPS = {
    "logprobs": lambda *a, **k: linear_logprobs(*a, **k).logprobs,
    "cross_entropy_none": _cross_entropy("none"),
    "cross_entropy_sum": _cross_entropy("sum"),
}
each_op = pytest.mark.parametrize("op", OPS)


def _gradients(op, problem, **options):
    hidden, weight, bias, target = problem
    out = OPS[op](hidden, weight, target, bias=bias, **options)
    g = torch.Generator().manual_seed(5)
    upstream = torch.randn(out.shape, generator=g, dtype=out.dtype)
    gradients = torch.autograd.grad(out, (hidden, weight, bias), upstream)
    return out.detach(), upstream.expand(len(target)), gradients


@each_op
def test_the_error_is_within_the_bound_and_the_mass_within_the_budget(op):
    problem = _peaked()
    hidden, weight, _, target = problem
    exact, upstream, (d_hidden, d_weight, _) = _gradients(op, problem)
    report = SkipReport()
    tau = 1e-3
    value, _, (s_hidden, s_weight, _) = _gradients(op, problem, skip_mass=tau, skip_report=report)
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
    assert report.mass.shape == target.shape
    assert 0 < report.mass.max() <= tau and report.mass[target < 0].eq(0).all()
    error = (s_hidden - d_hidden).norm(dim=1)
    bound = upstream.abs() * report.mass * weight.norm(dim=1).max()
    assert error.max() > 0
    assert (error <= bound * (1 + 1e-9) + 1e-12).all()
    assert (s_weight - d_weight).norm() <= tau * (upstream[:, None] * hidden).norm(dim=1).sum()


@each_op
def test_zero_is_exact_and_makes_no_plan(op):
    problem = _peaked(seed=1)
    report = SkipReport()
    _, _, ours = _gradients(op, problem, skip_mass=0.0, skip_report=report)
    _, _, theirs = _gradients(op, problem, impl="reference")
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert report.mass.eq(0).all()


def test_skipped_blocks_are_whole_blocks_of_live_rows_and_columns():
    """With the bound at its largest only the blocks of targets are left."""
    problem = _peaked(seed=2)
    hidden, weight, bias, target = problem
    _, _, (d_hidden, d_weight, _) = _gradients("logprobs", problem, skip_mass=1.0)
    rows = (target >= 0).nonzero().squeeze(1)
    upstream = torch.randn(
        len(target), generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )[rows]
    z = naive.logits(hidden, weight, bias)[rows].detach()
    dz = -z.softmax(dim=1) * upstream[:, None]
    dz[torch.arange(len(rows)), target[rows]] += upstream
    for start in range(0, len(rows), SKIP_ROWS):
        block = slice(start, start + SKIP_ROWS)
        alive = set((target[rows][block] // SKIP_COLUMNS).tolist())
        for tile in set(range(4)) - alive:
            dz[block, tile * SKIP_COLUMNS : (tile + 1) * SKIP_COLUMNS] = 0
    expected = torch.zeros_like(hidden).index_copy_(0, rows, dz @ weight)
    torch.testing.assert_close(d_hidden, expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(d_weight, (dz.t() @ hidden[rows]).detach(), rtol=1e-9, atol=1e-9)


def test_near_uniform_rows_skip_nothing():
    hidden, weight, bias, target = naive.make(140, D, V, scale=1e-3)
    report = SkipReport()
    linear_logprobs(*(hidden, weight, target), bias=bias, skip_mass=1e-2, skip_report=report)
    assert report.mass.eq(0).all()


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
def test_bad_budget(bad):
    hidden, weight, _, target = naive.make(4, 3, 5)
    for op in (linear_logprobs, linear_cross_entropy):
        with pytest.raises(ValueError, match=f"skip_mass.*{bad}"):
            op(hidden, weight, target, skip_mass=bad)
