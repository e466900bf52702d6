"""One process, no sharding. Also what runs a frozen model that DeepSpeed would not shard.

bfloat16 weights are trained through float32 copies, as DeepSpeed does: an update of a relative size
under 2^-8 would otherwise round to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s2srm import distributed
from s2srm.config import OptimConfig
from s2srm.engine.base import Engine, StepInfo
from s2srm.engine.heap import keep_freed_memory
from s2srm.engine.optim import build_optimizer, learning_rate
from s2srm.engine.pieces import Piece, whole_pieces


class TorchEngine(Engine):
    """Plain torch; `optim` None is a frozen model."""

    keeps_graphs = True

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig | None,
        total_steps: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.device = device or distributed.device()
        self.module = module.to(self.device)
        self.optim = optim
        self.total_steps = total_steps
        self.num_steps = 0
        if optim is None:
            self.module.requires_grad_(False)
            self.optimizer = None
            self._masters: list[tuple[Tensor, Tensor]] = []
        else:
            if self.device.type == "cpu":
                keep_freed_memory()
            self.optimizer = build_optimizer(self.module, optim)
            self._masters = _float32_masters(self.optimizer)

    def train_forward(self, *args: Any, **kwargs: Any) -> Any:
        self.wake(weights_only=True)
        self.module.train()
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.wake(weights_only=True)
        self.module.eval()
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        self.wake()
        loss.backward()

    def step(self) -> StepInfo:
        assert self.optimizer is not None and self.optim is not None, "a frozen model has no step"
        self.wake()
        lr = learning_rate(self.optim, self.num_steps, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if not norm.isfinite():
            # The weights stay as they are; the caller stops at this norm (guards.py).
            return StepInfo(float(norm), lr)
        if 0 < self.optim.max_grad_norm < float(norm):
            # Fused optimisers divide by it in the pass that they make anyway.
            self.optimizer.grad_scale = norm.float() / self.optim.max_grad_norm  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.zero_grad(set_to_none=True)
        self.adopt_masters()
        self.num_steps += 1
        return StepInfo(float(norm), lr)

    def pieces(self) -> list[Piece]:
        self.wake()
        return whole_pieces(self.module, self._masters)

    @torch.no_grad()
    def adopt_masters(self) -> None:
        self.wake()
        for weight, master in self._masters:
            weight.copy_(master)

    def whole(self, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
        self.wake(weights_only=True)
        return nullcontext()

    def weight_tensors(self) -> list[Tensor]:
        return list(self.module.parameters())


def _float32_masters(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Let the optimiser train float32 copies of its bfloat16 parameters; (weight, copy) pairs."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for group in optimizer.param_groups:
        for i, weight in enumerate(group["params"]):
            if weight.dtype == torch.bfloat16:
                master = group["params"][i] = nn.Parameter(weight.detach().float())
                weight.register_post_accumulate_grad_hook(partial(_hand_over, master))
                pairs.append((weight, master))
    return pairs


def _hand_over(master: Tensor, weight: Tensor) -> None:
    """Add a gradient to its master's as soon as backward has it, so that no two models' worth of
    gradients are ever there."""
    assert weight.grad is not None
    grad = weight.grad.float()
    master.grad = grad if master.grad is None else master.grad.add_(grad)
    weight.grad = None
