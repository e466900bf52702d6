"""Engines that wait in host memory: nothing left on the device, and nothing changed afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from s2srm.config import EngineConfig, OptimConfig
from s2srm.engine import Engine, build, build_engine, run_microbatches
from s2srm.engine.sleep import Sleeper
from s2srm.engine.torch_engine import TorchEngine
from s2srm.models.causal import PackedCausalLM
from s2srm.packing import Packed, Segment, pack

ADAMW = OptimConfig(lr=1e-2, schedule="constant")
BATCH = pack([Segment([3, 4, 5, 6], 1), Segment([9, 8, 7], 2)])


def test_views_share_what_comes_back() -> None:
    whole = torch.arange(6.0)
    part, other, scratch = whole[2:], torch.ones(3), torch.ones(2)
    sleeper = Sleeper()
    sleeper.sleep([part, whole, other], [scratch])
    assert sleeper.is_asleep
    for tensor in (whole, part, other, scratch):
        assert tensor.untyped_storage().nbytes() == 0
    sleeper.wake()
    assert not sleeper.is_asleep
    assert part.tolist() == [2, 3, 4, 5] and other.tolist() == [1, 1, 1]
    assert scratch.tolist() == [0, 0], "its content is nobody's"
    part[0] = 7.0
    assert whole[2] == 7.0
    sleeper.wake()  # nothing to do


@pytest.fixture
def sleepy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside a GPU; the host's memory is both places here."""
    monkeypatch.setattr(build, "relieves", lambda device: True)


def engine_for(dtype: torch.dtype, kind: str = "torch", train: bool = True) -> Engine:
    return build_engine(
        lambda zero: PackedCausalLM(tiny_model("gemma3-tied", dtype=dtype)),
        EngineConfig(kind, 3, "idle"),  # type: ignore[arg-type]
        ADAMW if train else None,
        4,
    )


def held(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def step(engine: Engine) -> float:
    def loss(batch: Packed) -> torch.Tensor:
        return engine.train_forward(batch, reduction="sum") / 4

    run_microbatches(engine, [BATCH, BATCH], loss)
    return engine.step().grad_norm


USES: dict[str, Callable[[Engine], object]] = {
    "forward": lambda engine: engine(BATCH, reduction="sum"),
    "gathered": lambda engine: engine.gathered().__enter__(),
    "step": step,
    "pieces": lambda engine: [piece.weight.sum() for piece in engine.pieces()],
    "adopt_masters": lambda engine: engine.adopt_masters(),
}


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sleep_between_steps_changes_nothing(kind: str, dtype: torch.dtype, sleepy: None) -> None:
    awake, engine = engine_for(dtype, kind), engine_for(dtype, kind)
    assert engine.optimizer is not None
    assert awake._weights.is_asleep, "built asleep: the next model has the device to itself"
    awake.wake()
    awake.may_sleep = False
    for _ in range(2):
        engine.sleep()
        awake.sleep()
        weights = engine.weight_tensors()
        state = [t for s in engine.optimizer.state.values() for t in s.values() if t.dim()]
        # Numbers alone in the assertions: pytest would print what is asleep.
        sizes = [held(tensors) for tensors in (weights, state, engine.scratch_tensors())]
        still = held(awake.weight_tensors())
        assert sizes == [0, 0, 0] and still > 0
        assert float(engine(BATCH, reduction="sum")) == float(awake(BATCH, reduction="sum"))
        sizes = [held(weights), held(state)]
        assert sizes[0] > 0 and sizes[1] == 0, "a forward needs no moments"
        assert step(engine) == step(awake)
        engine.sleep(weights=False)
        still = held(weights)
        assert still > 0
    found = zip(engine.pieces(), awake.pieces(), strict=True)
    assert all(torch.equal(mine.weight, theirs.weight) for mine, theirs in found)


@pytest.mark.parametrize("use", USES)
def test_every_use_wakes(use: str, sleepy: None) -> None:
    awake, engine = engine_for(torch.bfloat16), engine_for(torch.bfloat16)
    for one in (awake, engine):
        step(one)
    engine.sleep()
    USES[use](engine)
    USES[use](awake)
    with engine.gathered():
        pairs = zip(engine.module.parameters(), awake.module.parameters(), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_frozen_models_sleep(sleepy: None) -> None:
    engine = engine_for(torch.float32, train=False)
    before = engine(BATCH, reduction="sum")
    engine.sleep()
    still = held(engine.weight_tensors())
    assert still == 0
    assert torch.equal(engine(BATCH, reduction="sum"), before)


def test_where_the_device_is_the_host_nothing_moves() -> None:
    engine = engine_for(torch.float32)
    engine.sleep()
    assert held(engine.weight_tensors()) > 0


def test_gradients_go_to_their_masters_as_they_come() -> None:
    """Two parameters: when the second gradient is made, the first of them is gone already."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    engine = TorchEngine(module, ADAMW, 1, torch.device("cpu"))
    first, last = module[0].weight, module[1].weight
    seen: list[bool] = []
    first.register_hook(lambda grad: seen.append(last.grad is None))
    for _ in range(2):
        engine.backward(engine.train_forward(torch.ones(2, 4, dtype=torch.bfloat16)).sum())
    assert seen == [True, True]
    assert engine.optimizer is not None
    grads = [p.grad for group in engine.optimizer.param_groups for p in group["params"]]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
