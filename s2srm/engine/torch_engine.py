"""One process, no sharding. Also what runs a frozen model that DeepSpeed would not shard."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from s2srm import distributed
from s2srm.config import OptimConfig
from s2srm.engine.base import Engine, StepInfo
from s2srm.engine.optim import build_optimizer, learning_rate


class TorchEngine(Engine):
    """Plain torch; `optim` None is a frozen model."""

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig | None,
        total_steps: int,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or distributed.device()
        self.module = module.to(self.device)
        self.optim = optim
        self.total_steps = total_steps
        self.num_steps = 0
        if optim is None:
            self.module.requires_grad_(False)
            self.optimizer = None
        else:
            self.optimizer = build_optimizer(self.module, optim)

    def train_forward(self, *args: Any, **kwargs: Any) -> Any:
        self.module.train()
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.module.eval()
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        loss.backward()

    def step(self) -> StepInfo:
        assert self.optimizer is not None and self.optim is not None, "a frozen model has no step"
        lr = learning_rate(self.optim, self.num_steps, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.optim.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.optim.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        return StepInfo(float(norm), lr)

    def whole(self, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
        return nullcontext()
