"""Which engine runs a model, and its construction."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from s2srm import distributed
from s2srm.config import EngineConfig, OptimConfig
from s2srm.engine.base import Engine
from s2srm.engine.heap import give_back_freed_memory
from s2srm.engine.torch_engine import TorchEngine
from s2srm.errors import UserError
from s2srm.models.attention import MEANINGS, SDPA
from s2srm.models.causal import PackedCausalLM
from s2srm.models.check import check_batch, fault_of
from s2srm.models.choice import is_demanded
from s2srm.models.trunk import own_attention, takes_packed
from s2srm.models.value import PackedValueModel
from s2srm.watchdog import pulse

logger = logging.getLogger(__name__)

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
    The model is checked against Hugging Face's own forward, see `check_model`.
    """
    distributed.start()
    kind = engine_kind(cfg)
    if kind == "torch" or (optim is None and cfg.zero_stage < 3):
        engine: Engine = TorchEngine(factory(None), optim, total_steps)
    else:
        from s2srm.engine.deepspeed_engine import DeepSpeedEngine

        engine = DeepSpeedEngine(factory, cfg, optim, total_steps)
    engine.may_sleep = cfg.offload == "idle" and relieves(engine.device)
    pulse.beat()
    check_model(engine)
    # Where models sleep, the next one that is built has the device to itself.
    engine.sleep()
    if engine.device.type == "cpu":
        give_back_freed_memory()
    return engine


def relieves(device: torch.device) -> bool:
    """Whether tensors of this device take less of its memory while they are in the host's."""
    return device.type != "cpu"


def check_model(engine: Engine) -> None:
    """Hold the model to check.py in each manner that it can take, the fastest first.

    Packed by the attention function that was chosen, packed by SDPA (which can do what kernels may
    not, such as softcaps), and one sequence at a time with the model's own attention. What is
    chosen and why is logged once. UserError if the model is wrong in all. All ranks must call it.
    """
    module = engine.module
    if not isinstance(module, PackedCausalLM | PackedValueModel):
        return
    lm = module.lm
    kind = lm.config.model_type
    first, *others = _manners(lm)
    if not takes_packed(lm):
        log_change(kind, first, "its attention has no interface for packed batches")
    fault = _fault(engine)
    for attention in others:
        if fault is None:
            return
        if is_demanded(lm):
            raise UserError(
                f"{module.where}: attention: flash is wrong for {kind} models here: {fault}; take "
                "auto or sdpa"
            )
        log_change(kind, attention, fault)
        lm.set_attn_implementation(attention)
        fault = _fault(engine)
    if fault is not None:
        raise UserError(
            f"{module.where}: {kind} models are not supported: {fault}; take another causal "
            "language model"
        )


def _manners(lm: PreTrainedModel) -> list[str]:
    """Attention functions to try one after the other."""
    first = str(lm.config._attn_implementation)
    if not takes_packed(lm):
        return [first]
    return list(dict.fromkeys([first, SDPA, own_attention(lm)]))


def _fault(engine: Engine) -> str | None:
    """What is wrong with the model as it is now, the same on every rank; None if it is right."""
    module = engine.module
    assert isinstance(module, PackedCausalLM | PackedValueModel)
    batch = check_batch(module.lm).to(engine.device)
    dtype = next(module.lm.parameters()).dtype
    try:
        fault = fault_of(engine(batch, "check").tolist(), dtype)
    except Exception as error:
        fault = f"it raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return next((text for text in distributed.gather_objects(fault) if text is not None), None)


@cache
def log_change(kind: str, attention: str, reason: str) -> None:
    """Said once for an architecture, on rank 0."""
    if distributed.is_main():
        manner = MEANINGS.get(attention, "one sequence at a time, which is slower")
        logger.warning("%s models take %s: %s", kind, manner, reason)


def engine_kind(cfg: EngineConfig) -> str:
    """torch or deepspeed, with `auto` decided; UserError where the choice cannot be.

    Known before any model is loaded, so that stages can call it first.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    kind = cfg.kind
    if kind == "auto":
        kind = "deepspeed" if world > 1 or cfg.offload == "cpu" else "torch"
    if kind == "torch" and world > 1:
        raise UserError(f"engine.kind torch runs in one process, torchrun started {world}")
    if kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "engine.kind deepspeed: the package is not installed; pip install 's2srm[deepspeed]'"
        )
    if cfg.offload == "cpu" and (kind != "deepspeed" or cfg.zero_stage != 3):
        raise UserError(
            f"engine.offload cpu needs engine.kind deepspeed and zero_stage 3, got {kind} and "
            f"{cfg.zero_stage}; offload idle needs neither"
        )
    return kind
