"""The adapters: ours and torch's for real, everyone else's against a stand-in with their signature.

A stand-in computes with plain torch what the peer's documentation says, so that a swapped argument,
a lost sign or a wrong reduction in an adapter shows without a GPU.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import checking
from benchmarks.definitions import VOCABULARY_OPS
from benchmarks.measure import outputs_and_gradients
from benchmarks.problems import normal_problem
from benchmarks.products import BOTH, modes_of
from benchmarks.providers import PROVIDERS, providers_named
from benchmarks.providers.base import absent, hopper, plain_head
from benchmarks.providers.cce import CutCrossEntropy, CutCrossEntropyExact
from benchmarks.providers.eager import Compiled, TorchChunked
from benchmarks.providers.liger import (
    LigerGRPO,
    LigerScaled,
    LigerSM90,
    LigerTriton,
    LigerTritonFloat32,
)
from benchmarks.providers.quack import Quack
from benchmarks.providers.verl import Verl
from benchmarks.shapes import Shape

SHAPE = Shape("test", 48, 128, 304)


def hold_to_the_rule(provider, op, cpu):
    problem = normal_problem(SHAPE, torch.float32, cpu, ignored=0.4)
    backward = BOTH in modes_of(op)
    assert provider.refuses(op, problem, backward) is None
    run = provider.build(op, problem)
    outputs, gradients = outputs_and_gradients(run, problem, backward)
    assert tuple(outputs) == provider.outputs(op)
    truth = checking.find_truth(op, problem, provider.outputs(op), backward)
    errors = checking.compare(op, problem, truth.exact, outputs, gradients)
    assert checking.within(errors, truth, torch.float32), (errors, truth.eager_errors)
    with torch.no_grad():
        for name, value in run().items():
            torch.testing.assert_close(value, outputs[name])


def install(monkeypatch, name, **members):
    """A module in sys.modules, and its parents."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        full = ".".join(parts[:end])
        if full not in sys.modules:
            monkeypatch.setitem(sys.modules, full, ModuleType(full))
    for key, value in members.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def applying(function):
    """Something with the `apply` of an autograd function."""
    return SimpleNamespace(apply=function)


HERE = [p for p in PROVIDERS if p.name.startswith(("s2srm-", "torch-eager", "torch-chunked"))]


@pytest.mark.parametrize("op", VOCABULARY_OPS)
@pytest.mark.parametrize("provider", HERE, ids=lambda provider: provider.name)
def test_ours_and_torchs(provider, op, cpu):
    problem = normal_problem(SHAPE, torch.float32, cpu)
    reason = provider.missing(cpu) or provider.refuses(op, problem, BOTH in modes_of(op))
    if reason is not None:
        pytest.skip(reason)
    hold_to_the_rule(provider, op, cpu)


@pytest.mark.parametrize("op", VOCABULARY_OPS)
def test_compiled(op, cpu, monkeypatch):
    """As torch.compile without a compiler: the graph breaks nowhere."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic: compile_(f, backend="eager", fullgraph=True)
    )
    hold_to_the_rule(Compiled(), op, cpu)


def flce(fail_on=None):
    def apply(
        hidden, weight, target, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing,
        reduction, softcap, return_z_loss, accum_dtype,
    ):  # fmt: skip
        assert (bias, ce_weight, softcap, return_z_loss) == (None, None, None, False)
        assert (lse_square_scale, label_smoothing) == (0.0, 0.0)
        assert accum_dtype == fail_on
        loss = F.cross_entropy(
            hidden @ weight.t(), target, ignore_index=ignore_index, reduction=reduction
        )
        return loss, None, None, None

    return applying(apply)


@pytest.mark.parametrize(
    ("provider", "accum"), [(LigerTriton(), None), (LigerTritonFloat32(), torch.float32)]
)
def test_liger_triton(provider, accum, cpu, monkeypatch):
    install(
        monkeypatch,
        "liger_kernel.ops.fused_linear_cross_entropy",
        LigerFusedLinearCrossEntropyFunction=flce(accum),
    )
    hold_to_the_rule(provider, "linear_cross_entropy", cpu)


def test_liger_sm90(cpu, monkeypatch):
    def apply(hidden, weight, target, ignore_index, reduction):
        z = hidden @ weight.t()
        return F.cross_entropy(z, target, ignore_index=ignore_index, reduction=reduction)

    install(
        monkeypatch,
        "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90",
        LigerFusedLinearCrossEntropySM90Function=applying(apply),
    )
    problem = normal_problem(SHAPE, torch.float32, cpu)
    assert LigerSM90().refuses("linear_cross_entropy", problem, True) == "bfloat16 only"
    half = normal_problem(SHAPE, torch.bfloat16, cpu)
    assert LigerSM90().refuses("linear_cross_entropy", half, True) is None
    loss = LigerSM90().build("linear_cross_entropy", problem)()["loss"]
    z = problem.hidden @ problem.weight.t()
    torch.testing.assert_close(loss, F.cross_entropy(z, problem.target))


@pytest.mark.parametrize("op", VOCABULARY_OPS)
def test_liger_scaled(op, cpu, monkeypatch):
    def apply(hidden, weight, target, temperature, ignore_index, m_tiles, return_entropy):
        assert (temperature, m_tiles, return_entropy) == (1.0, 1, True)
        logp = torch.log_softmax(hidden @ weight.t(), -1)
        nll = F.nll_loss(logp, target, ignore_index=ignore_index, reduction="none")
        return nll, -(logp.exp() * logp).sum(-1)

    install(
        monkeypatch,
        "liger_kernel.ops.fused_linear_scaled_cross_entropy",
        LigerFusedLinearScaledCrossEntropyFunction=applying(apply),
    )
    hold_to_the_rule(LigerScaled(), op, cpu)


def test_liger_grpo(cpu, monkeypatch):
    def make(beta, compiled, use_ref_model, chunk_size, epsilon_low, epsilon_high, loss_type):
        assert (beta, compiled, use_ref_model, loss_type) == (0.0, False, False, "bnpo")
        assert chunk_size == SHAPE.num_rows

        def loss(hidden, weight, ids, mask, advantages, old_per_token_logps):
            assert hidden.shape == (48, 1, 128)
            assert ids.shape == mask.shape == old_per_token_logps.shape == (48, 1)
            assert advantages.shape == (48,)
            logp = torch.log_softmax(hidden @ weight.t(), -1).gather(2, ids[..., None])[..., 0]
            ratio = (logp - old_per_token_logps).exp()
            clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
            rows = -torch.min(ratio * advantages[:, None], clipped * advantages[:, None])
            return (rows * mask).sum() / mask.sum(), (torch.zeros(()),)

        return loss

    install(monkeypatch, "liger_kernel.chunked_loss", LigerFusedLinearGRPOLoss=make)
    hold_to_the_rule(LigerGRPO(), "linear_ppo_loss", cpu)


@pytest.mark.parametrize("provider", [CutCrossEntropy(), CutCrossEntropyExact()])
@pytest.mark.parametrize("op", VOCABULARY_OPS)
def test_cut_cross_entropy(op, provider, cpu, monkeypatch):
    def linear_cross_entropy(e, c, targets, *, ignore_index, reduction, impl):
        assert impl == provider.impl
        z = e @ c.t()
        return F.cross_entropy(z, targets, ignore_index=ignore_index, reduction=reduction)

    install(monkeypatch, "cut_cross_entropy", linear_cross_entropy=linear_cross_entropy)
    hold_to_the_rule(provider, op, cpu)


def test_quack(cpu, monkeypatch):
    def chunked_linear_cross_entropy(x, weight, target, *, ignore_index, reduction):
        return F.cross_entropy(
            x @ weight.t(), target, ignore_index=ignore_index, reduction=reduction
        )

    install(
        monkeypatch,
        "quack.linear_cross_entropy",
        chunked_linear_cross_entropy=chunked_linear_cross_entropy,
    )
    hold_to_the_rule(Quack(), "linear_cross_entropy", cpu)


@pytest.mark.parametrize("op", VOCABULARY_OPS)
def test_verl_is_loaded_without_its_package(op, cpu, monkeypatch, tmp_path):
    folder = tmp_path / "verl" / "utils" / "kernel"
    folder.mkdir(parents=True)
    (tmp_path / "verl" / "__init__.py").write_text("raise ImportError('needs ray')")
    (tmp_path / "verl" / "version").mkdir()
    (tmp_path / "verl" / "version" / "version").write_text("0.7.0\n")
    (folder / "linear_cross_entropy.py").write_text(
        "import torch\n"
        "def linear_cross_entropy(hidden, weight, labels, temperature, reduction, group):\n"
        "    assert (temperature, reduction, group) == (1.0, 'none', None)\n"
        "    assert labels.min() >= 0\n"
        "    logp = torch.log_softmax(hidden @ weight.t(), -1)\n"
        "    picked = logp.gather(1, labels[:, None])[:, 0]\n"
        "    return picked, -(logp.exp() * logp).sum(-1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ["verl", "verl.utils", "verl.utils.kernel", "verl.utils.kernel.linear_cross_entropy"]
    try:
        assert Verl().version() == "0.7.0"
        hold_to_the_rule(Verl(), op, cpu)
    finally:
        for name in names:
            sys.modules.pop(name, None)


def test_what_is_not_here_says_how_to_get_it(cpu):
    assert absent("no_such_module", "no-such-package") == (
        "not installed: no module no_such_module (pip install no-such-package)"
    )
    for provider in PROVIDERS:
        reason = provider.missing(cpu)
        assert reason is None or len(reason) > 8
    assert hopper(cpu) == "needs a GPU"
    assert (
        "torch >= 2.13" in str(TorchChunked().missing(cpu)) or TorchChunked().missing(cpu) is None
    )


def test_options_are_refused_by_those_who_lack_them(cpu):
    problem = normal_problem(SHAPE, torch.float32, cpu)
    assert plain_head(problem) is None
    problem.softcap, problem.kl_coef = 2.0, 0.1
    assert plain_head(problem) == "not asked for softcap, kl_coef"
    assert TorchChunked().refuses("linear_cross_entropy", problem, True) is not None
    narrow = normal_problem(Shape("narrow", 8, 100, 64), torch.float32, cpu)
    assert "128" in str(Verl().refuses("linear_ppo_loss", narrow, True))


def test_names():
    assert len({provider.name for provider in PROVIDERS}) == len(PROVIDERS)
    chosen = providers_named(["verl", "s2srm-cpp", "torch-padded"])
    assert [provider.name for provider in chosen] == ["s2srm-cpp", "verl"]
    with pytest.raises(ValueError, match="'nobody' is not one of"):
        providers_named(["nobody"])
