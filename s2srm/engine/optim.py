"""Optimiser objects and learning-rate schedules, the same for every engine."""

from __future__ import annotations

import math

import torch
from torch import nn

from s2srm.config import OptimConfig
from s2srm.errors import UserError


def build_optimizer(module: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable parameters; weight decay on matrices only.

    Fused: one pass over weights, gradients and moments, with nothing of their size beside them.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the module has no trainable parameter")
    matrices = [p for p in trainable if len(_shape(p)) >= 2]
    others = [p for p in trainable if len(_shape(p)) < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, cfg.weight_decay), (others, 0.0))
        if params
    ]
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr, fused=True)
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
    raise UserError(f"optim.name must be adamw or sgd, got {cfg.name!r}")


def learning_rate(cfg: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step` = 0, 1, ..., total_steps - 1.

    Rises linearly over warmup_steps to cfg.lr, which the step after the warm-up has; linear and
    cosine then fall so that they would be 0 at step total_steps.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / (cfg.warmup_steps + 1)
    if cfg.schedule == "constant":
        return cfg.lr
    length = max(1, total_steps - cfg.warmup_steps)
    done = min(1.0, (step - cfg.warmup_steps) / length)
    if cfg.schedule == "linear":
        return cfg.lr * (1.0 - done)
    return cfg.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape, also where ZeRO-3 has left an empty placeholder."""
    return getattr(parameter, "ds_shape", parameter.shape)
