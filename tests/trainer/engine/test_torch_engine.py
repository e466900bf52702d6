"""The single-process engine: sums of micro-batches, clipping, freezing, saving."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import AttentionInterface

from s2srm.config import EngineConfig, OptimConfig
from s2srm.engine import build, build_engine, map_microbatches, run_microbatches
from s2srm.engine.build import engine_kind
from s2srm.engine.torch_engine import TorchEngine
from s2srm.errors import UserError
from s2srm.models import flash
from s2srm.models.attention import SDPA
from s2srm.models.causal import PackedCausalLM
from s2srm.packing import Packed, Segment, pack

SEGMENTS = [Segment([3, 4, 5, 6], 1), Segment([9, 8, 7], 2), Segment([20, 21, 22, 23, 24], 3)]
SGD = OptimConfig(name="sgd", lr=0.5, schedule="constant", max_grad_norm=0.0)


def engine_for(optim: OptimConfig | None = SGD) -> TorchEngine:
    engine = build_engine(
        lambda zero: PackedCausalLM(tiny_model("gemma3-tied")), EngineConfig(), optim, 4
    )
    assert isinstance(engine, TorchEngine)
    return engine


def one_step(engine: TorchEngine, groups: list[list[Segment]]) -> tuple[float, float]:
    count = sum(segment.num_predicted for group in groups for segment in group)

    def loss(batch: Packed) -> torch.Tensor:
        return engine.train_forward(batch, reduction="sum") / count

    total = run_microbatches(engine, [pack(group) for group in groups], loss)
    return float(total), engine.step().grad_norm


def test_micro_batches_change_nothing() -> None:
    whole, parts = engine_for(), engine_for()
    a = one_step(whole, [SEGMENTS])
    b = one_step(parts, [[segment] for segment in SEGMENTS])
    assert a == pytest.approx(b, rel=1e-5)
    for p, q in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_sgd_step_is_the_gradient_and_clipping_scales_it() -> None:
    plain, clipped = engine_for(), engine_for(OptimConfig(**{**vars(SGD), "max_grad_norm": 0.01}))
    before = copy.deepcopy(dict(plain.module.named_parameters()))
    _, norm = one_step(plain, [SEGMENTS])
    _, same_norm = one_step(clipped, [SEGMENTS])
    assert norm == pytest.approx(same_norm) and norm > 0.01
    moved, moved_clipped = (
        torch.cat([(p - before[n]).flatten() for n, p in engine.module.named_parameters()])
        for engine in (plain, clipped)
    )
    assert float(moved.norm()) == pytest.approx(0.5 * norm, rel=1e-4)
    torch.testing.assert_close(moved_clipped, moved * 0.01 / norm, rtol=1e-3, atol=1e-7)


def test_no_micro_batch_at_all_leaves_the_weights() -> None:
    engine = engine_for()
    before = copy.deepcopy(dict(engine.module.named_parameters()))
    assert float(run_microbatches(engine, [], lambda batch: batch)) == 0.0
    assert engine.step().grad_norm == 0.0
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_leaves_the_weights(bad: float, clip: float) -> None:
    """Clipping by such a norm would spread it over every weight."""
    engine = engine_for(OptimConfig(**{**vars(SGD), "max_grad_norm": clip}))
    before = copy.deepcopy(dict(engine.module.named_parameters()))
    engine.backward(engine.train_forward(pack(SEGMENTS)))
    parameter = next(engine.module.parameters())
    assert parameter.grad is not None
    parameter.grad.view(-1)[0] = bad
    assert not math.isfinite(engine.step().grad_norm)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, before[name])


def test_frozen_engine_gives_no_gradient_and_no_step() -> None:
    engine = engine_for(None)
    assert not any(p.requires_grad for p in engine.module.parameters())
    results = map_microbatches(
        engine, [pack([s]) for s in SEGMENTS], lambda b: engine(b, "logprobs").logprobs
    )
    assert [r.numel() for r in results] == [s.num_predicted for s in SEGMENTS]
    with pytest.raises(AssertionError, match="frozen"):
        engine.step()


def test_evaluation_has_no_graph_and_export_names_every_tensor(tmp_path: Path) -> None:
    engine = engine_for()
    assert not engine(pack(SEGMENTS)).requires_grad
    assert engine.train_forward(pack(SEGMENTS)).requires_grad
    names = [name for name, _ in engine.export_state()]
    assert names == [name for name, _ in tiny_model("gemma3-tied").named_parameters()]


def test_a_model_with_other_logits_is_refused() -> None:
    def factory(zero: object) -> nn.Module:
        model = PackedCausalLM(tiny_model("granite"), "folder/x")
        model.head.scale = 1.0
        return model

    with pytest.raises(UserError, match="folder/x: granite models are not supported: its logprobs"):
        build_engine(factory, EngineConfig(), None)


@pytest.mark.parametrize(
    "name, expected", [("gemma2", SDPA), ("llama", SDPA), ("granite-sinks", "eager")]
)
def test_packed_sdpa_comes_before_one_by_one(
    name: str, expected: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where torch's varlen kernels cannot do it: a softcap, a device, sinks."""
    build.log_change.cache_clear()
    lm = tiny_model(name.removesuffix("-sinks"))
    lm.set_attn_implementation(flash.TORCH.name)
    if expected == "eager":
        monkeypatch.setattr(build, "own_attention", lambda lm: "eager")
        sinks = AttentionInterface()[SDPA]
        monkeypatch.setitem(
            AttentionInterface._global_mapping,
            SDPA,
            lambda *args, **kwargs: sinks(*args, **kwargs, s_aux=torch.zeros(4)),
        )
    build_engine(lambda zero: PackedCausalLM(lm, "x"), EngineConfig(), None)
    assert lm.config._attn_implementation == expected
    said = [record.getMessage() for record in caplog.records if record.name == build.__name__]
    assert "call per sequence: it raises" in said[0]
    assert len(said) == 1 + (expected == "eager")
    if expected == "eager":
        assert "one sequence at a time" in said[1] and "sinks" in said[1]


def test_engine_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_kind(EngineConfig()) == "torch"
    assert engine_kind(EngineConfig(kind="deepspeed")) == "deepspeed"
    assert engine_kind(EngineConfig(offload="cpu")) == "deepspeed"
    assert engine_kind(EngineConfig(offload="idle")) == "torch"
    for kind, stage in (("deepspeed", 2), ("torch", 3)):
        with pytest.raises(
            UserError, match=rf"engine\.offload cpu needs .* got {kind} and {stage}"
        ):
            engine_kind(EngineConfig(kind, stage, "cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert engine_kind(EngineConfig()) == "deepspeed"
    with pytest.raises(UserError, match="torchrun started 2"):
        engine_kind(EngineConfig(kind="torch"))


def test_bfloat16_weights_are_trained_through_float32_copies() -> None:
    """Steps that each round to nothing in bfloat16 add up."""
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    module = nn.Linear(4, 4, bias=False)
    module.weight = weight
    optim = OptimConfig(name="sgd", lr=1e-3, schedule="constant", max_grad_norm=0.0)
    engine = TorchEngine(module, optim, 20, torch.device("cpu"))
    for step in range(20):
        for last in (False, True):
            loss = engine.train_forward(torch.ones(1, 4, dtype=torch.bfloat16)).sum() / 2
            engine.backward(loss, last)
        assert engine.step().grad_norm == pytest.approx(4.0)
        if step == 0:
            assert torch.equal(weight, torch.ones_like(weight))
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 0.98))
