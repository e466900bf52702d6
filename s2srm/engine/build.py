"""Which engine runs a model, and its construction."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from s2srm import distributed
from s2srm.config import EngineConfig, OptimConfig
from s2srm.engine.base import Engine
from s2srm.engine.torch_engine import TorchEngine
from s2srm.errors import UserError
from s2srm.models.causal import PackedCausalLM, check_batch, judge_check

ModelFactory = Callable[[dict[str, Any] | None], nn.Module]


def build_engine(
    factory: ModelFactory, cfg: EngineConfig, optim: OptimConfig | None, total_steps: int = 1
) -> Engine:
    """The engine for the model that `factory(zero_config)` makes.

    factory: called once with DeepSpeed's configuration where parameters are to be partitioned as
    they are created (ZeRO-3), else with None; for example
    `lambda zero: load_causal_lm(cfg.model, zero_config=zero, train=True)`.
    optim: None makes a frozen inference engine, sharded under ZeRO-3, else whole on every rank.
    total_steps: optimiser steps in all, for the learning-rate schedule.
    A PackedCausalLM is checked against Hugging Face's logits; UserError if they differ.
    """
    distributed.start()
    kind = engine_kind(cfg)
    if kind == "torch" or (optim is None and cfg.zero_stage < 3):
        engine: Engine = TorchEngine(factory(None), optim, total_steps)
    else:
        from s2srm.engine.deepspeed_engine import DeepSpeedEngine

        engine = DeepSpeedEngine(factory, cfg, optim, total_steps)
    module = engine.module
    if isinstance(module, PackedCausalLM):
        batch = check_batch(module.config.vocab_size).to(engine.device)
        exact = next(module.parameters()).dtype in (torch.float32, torch.float64)
        judge_check(engine(batch, "check"), module.where, 1e-3 if exact else 0.25)
    return engine


def engine_kind(cfg: EngineConfig) -> str:
    """torch or deepspeed, with `auto` decided; UserError where the choice cannot be.

    Known before any model is loaded, so that stages can call it first.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    kind = cfg.kind
    if kind == "auto":
        kind = "deepspeed" if world > 1 else "torch"
    if kind == "torch" and world > 1:
        raise UserError(f"engine.kind torch runs in one process, torchrun started {world}")
    if kind == "deepspeed" and cfg.offload == "cpu" and cfg.zero_stage != 3:
        raise UserError(f"engine.offload cpu needs zero_stage 3, got {cfg.zero_stage}")
    return kind
