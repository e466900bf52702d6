"""Schedules and parameter groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from s2srm.config import OptimConfig
from s2srm.engine.optim import build_optimizer, learning_rate
from s2srm.errors import UserError


def test_linear_warms_up_and_falls_to_zero() -> None:
    cfg = OptimConfig(lr=1.0, warmup_steps=3)
    rates = [learning_rate(cfg, step, 11) for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert learning_rate(cfg, 11, 11) == 0.0


def test_cosine_and_constant() -> None:
    cosine = OptimConfig(lr=2.0, schedule="cosine")
    assert learning_rate(cosine, 0, 10) == 2.0
    assert learning_rate(cosine, 5, 10) == pytest.approx(1.0)
    assert learning_rate(cosine, 10, 10) == pytest.approx(0.0)
    constant = OptimConfig(lr=2.0, schedule="constant", warmup_steps=1)
    assert [learning_rate(constant, step, 5) for step in (0, 1, 4)] == [1.0, 2.0, 2.0]


def test_more_warm_up_than_steps_never_exceeds_the_peak() -> None:
    cfg = OptimConfig(lr=1.0, warmup_steps=100)
    assert max(learning_rate(cfg, step, 10) for step in range(10)) < 0.2


def test_weight_decay_is_for_matrices() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = build_optimizer(module, OptimConfig(weight_decay=0.1))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decay[id(p)] for p in module.parameters()] == [0.1, 0.0, 0.0, 0.0]


def test_zero3_placeholders_are_grouped_by_their_whole_shape() -> None:
    matrix = nn.Parameter(torch.zeros(0))
    matrix.ds_shape = torch.Size((4, 3))  # pyright: ignore[reportAttributeAccessIssue]
    module = nn.Module()
    module.register_parameter("matrix", matrix)
    optimizer = build_optimizer(module, OptimConfig(weight_decay=0.1))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    optimizer = build_optimizer(module, OptimConfig(name="sgd"))
    assert [p.shape for g in optimizer.param_groups for p in g["params"]] == [(2, 3)]
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(module.requires_grad_(False), OptimConfig())


def test_unknown_optimizer() -> None:
    with pytest.raises(UserError, match="adamw or sgd, got 'lion'"):
        build_optimizer(nn.Linear(1, 1), OptimConfig(name="lion"))  # pyright: ignore
