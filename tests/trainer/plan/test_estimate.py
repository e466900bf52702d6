"""What waits in host memory where engine.offload is idle, and the rollout's budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from s2srm.commands.parsing import parse
from s2srm.config import PPOConfig
from s2srm.plan.devices import DEVICES, GIB
from s2srm.plan.estimate import Estimate
from s2srm.plan.lengths import find_lengths
from s2srm.plan.models import Place

CFG = parse(PPOConfig, ["--config", "gemma-2b-ppo"], "ppo", "")
PLACE = Place(DEVICES["h100"], 1)


def by_phase(**changes: Any) -> dict[str, dict[str, float]]:
    """Phase -> largest bytes by kind."""
    cfg = replace(CFG, **changes)
    found: dict[str, dict[str, float]] = {}
    for moment in Estimate(cfg, PLACE, find_lengths(cfg)).moments():
        kinds = found.setdefault(moment.phase, {})
        for kind, size in moment.bytes.items():
            kinds[kind] = max(kinds.get(kind, 0.0), size)
    return found


def test_only_what_a_phase_uses_is_on_the_device():
    idle = by_phase()
    engine = replace(CFG.engine, offload="none")
    awake = by_phase(engine=engine)
    one = 2 * 2_506_172_416
    assert idle["rollout"]["weights"] == idle["reward"]["weights"] == one
    assert "optimiser" not in idle["experience"] and "master weights" not in idle["experience"]
    assert idle["update policy"]["optimiser"] == 4 * one
    # The critic has a head of its own: a few thousand parameters.
    assert abs(awake["rollout"]["weights"] - 4 * one) < 1e5
    assert abs(awake["update policy"]["optimiser"] - 8 * one) < 1e5
    estimate = Estimate(CFG, PLACE, find_lengths(CFG))
    assert abs(estimate.host - (4 * one + 2 * 6 * one)) < 1e6
    assert Estimate(replace(CFG, engine=engine), PLACE, find_lengths(CFG)).host == 0


def test_on_a_cpu_nothing_sleeps():
    cpu = Place(replace(DEVICES["h100"], is_cpu=True), 1)
    assert not Estimate(CFG, cpu, find_lengths(CFG)).sleeps


def test_the_budget_bounds_the_rollouts_keys_and_values():
    def cache(gib: float) -> float:
        sampling = replace(CFG.sampling, batch_size=512, kv_cache_gib=gib)
        return by_phase(sampling=sampling)["rollout"]["KV cache"]

    assert cache(0.0) > 4 * GIB
    assert 1.9 * GIB < cache(2.0) <= 2 * GIB
