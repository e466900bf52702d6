"""DeepSpeed ZeRO, stages 0 to 3, with our loss convention and our optimisers.

DeepSpeed's own habits that are undone here: it clips gradients at 1.0 unless told otherwise,
averages them over ranks, divides the loss by a fixed number of accumulation steps, adds up
bfloat16 gradients in bfloat16, takes a bucket larger than a small model, looks for MPI
without torchrun's variables, compiles a shared-memory operator at its first start on a CPU (used
only by tensor-parallel inference), and logs a page.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from s2srm import distributed
from s2srm.config import EngineConfig, OptimConfig
from s2srm.engine.base import Engine, StepInfo
from s2srm.engine.heap import map_large_blocks
from s2srm.engine.optim import build_optimizer, learning_rate
from s2srm.engine.pieces import Piece, whole_pieces, zero_3_pieces, zero_12_pieces
from s2srm.errors import UserError

logger = logging.getLogger(__name__)

REDUCE_BUCKET_ELEMENTS = 50_000_000
"""Gradients that are collected before they are reduced. DeepSpeed's own 500 million take ten times
the memory, twice at a time, and a message of 100 MB already runs at a link's full rate."""


class DeepSpeedEngine(Engine):
    """A model under DeepSpeed; `optim` None is a frozen ZeRO-3 inference engine."""

    def __init__(
        self,
        factory: Callable[[dict[str, Any] | None], nn.Module],
        cfg: EngineConfig,
        optim: OptimConfig | None,
        total_steps: int,
    ) -> None:
        super().__init__()
        self.deepspeed = import_deepspeed()
        distributed.start_alone()
        self.device = distributed.device()
        self.optim = optim
        self.total_steps = total_steps
        self.num_steps = 0
        config = deepspeed_config(cfg, optim, torch.float32)
        self.module = factory(config if cfg.zero_stage == 3 else None)
        dtype = next(self.module.parameters()).dtype
        num_elements = sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters())
        if dtype == torch.float64:
            raise UserError("model.precision float64 needs engine.kind torch")
        if cfg.zero_stage == 0 and dtype == torch.bfloat16:
            cfg = replace(cfg, zero_stage=1)
            log_once("ZeRO-1 instead of 0: DeepSpeed adds bfloat16 gradients in float32 from 1 on")
        self.stage = cfg.zero_stage
        self.replicated = self.stage == 0
        if optim is None:
            self.module.requires_grad_(False)
        if optim is not None and self.device.type == "cpu":
            map_large_blocks()
        self.optimizer = None if optim is None else build_optimizer(self.module, optim)
        log_once(
            f"DeepSpeed {self.deepspeed.__version__}: ZeRO-{self.stage}, "
            f"{distributed.world_size()} ranks, offload {cfg.offload}"
        )
        self.engine: Any
        self.engine, *_ = self.deepspeed.initialize(
            model=self.module,
            optimizer=self.optimizer,
            config=deepspeed_config(cfg, optim, dtype, num_elements),
            dist_init_required=False,
        )

    def train_forward(self, *args: Any, **kwargs: Any) -> Any:
        self.wake(weights_only=True)
        self.engine.train()
        return self.engine(*args, **kwargs)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.wake(weights_only=True)
        self.engine.eval()
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        self.wake()
        # DeepSpeed divides by the number of ranks; the factor makes the mean a sum again.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * distributed.world_size(), scale_wrt_gas=False)

    def step(self) -> StepInfo:
        assert self.optim is not None, "a frozen model has no step"
        self.wake()
        lr = learning_rate(self.optim, self.num_steps, self.total_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        norm = self._norm_unsharded() if self.stage == 0 else None
        self.engine.step()
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        self.num_steps += 1
        # ZeRO says -1 for a norm that is not finite.
        return StepInfo(float(norm) if norm >= 0 else math.nan, lr)

    def _norm_unsharded(self) -> Tensor:
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(grads)

    def pieces(self) -> list[Piece]:
        assert self.optimizer is not None, "a frozen model has no optimiser"
        self.wake()
        zero = self.engine.optimizer
        if self.stage == 3:
            return zero_3_pieces(self.module, zero)
        if self.stage > 0:
            flat = [group["params"][0] for group in self.optimizer.param_groups]
            return zero_12_pieces(self.module, flat)
        return whole_pieces(self.module, self._masters_unsharded())

    @torch.no_grad()
    def adopt_masters(self) -> None:
        self.wake()
        zero = self.engine.optimizer
        if self.stage == 3:
            # As DeepSpeed does after a step, with nothing whole in the meantime.
            zero.checkpoint_event_prologue()
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero.checkpoint_event_epilogue()
        elif self.stage > 0:
            zero.update_lp_params()
        else:
            for weight, master in self._masters_unsharded():
                weight.copy_(master)

    def _masters_unsharded(self) -> list[tuple[Tensor, Tensor]]:
        """ZeRO-0: (weight, float32 copy) of bfloat16 parameters."""
        zero = self.engine.optimizer
        if zero is self.optimizer:
            return []
        groups = zip(zero.fp16_groups, zero.fp32_groups, strict=True)
        return [pair for weights, masters in groups for pair in zip(weights, masters, strict=True)]

    def whole(self, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
        self.wake(weights_only=True)
        sharded = [t for t in tensors if hasattr(t, "ds_id")]
        if self.stage < 3 or not sharded:
            return nullcontext()
        return self.deepspeed.zero.GatheredParameters(sharded, modifier_rank=None)

    def weight_tensors(self) -> list[Tensor]:
        if self.stage < 3:
            return list(self.module.parameters())
        sharded: Any = self.module.parameters()
        return [parameter.ds_tensor for parameter in sharded]

    def scratch_tensors(self) -> list[Tensor]:
        if self.stage < 3:
            return []
        zero = self.engine.optimizer
        buckets = [bucket.buffer for bucket in zero.ipg_buckets.values()]
        return [t for t in (zero.grad_partitions_flat_buffer, *buckets) if t is not None]

    def sleep(self, *, weights: bool = True) -> None:
        if self.may_sleep and self.stage == 3:
            # What was fetched ahead for a backward that did not come. The engine's own method of
            # this name also walks over every object of the process, a second each time.
            self.engine.optimizer.empty_partition_cache()
        super().sleep(weights=weights)


@cache
def log_once(text: str) -> None:
    """One line, on rank 0, however many engines there are."""
    if distributed.is_main():
        logger.info(text)


@cache
def import_deepspeed() -> ModuleType:
    """Import deepspeed with its surroundings set right; the only import of it in the project."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
        import deepspeed.ops
        from deepspeed.runtime import bf16_optimizer
        from deepspeed.utils import nvtx
    except ImportError as error:
        raise UserError(f"engine.kind deepspeed: it cannot be imported: {error}") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It prints the memory in use a dozen times.
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None
    # torch 2.13 renames collectives that deepspeed 0.19 calls by their old names.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Ranges for a profiler, around every hook of every module: a tenth of a small model's step.
    nvtx.enable_nvtx = False
    # DeepSpeed collects garbage at every start of an engine: what is imported by now is none.
    gc.freeze()
    return deepspeed


def deepspeed_config(
    cfg: EngineConfig,
    optim: OptimConfig | None,
    dtype: torch.dtype,
    num_elements: int = REDUCE_BUCKET_ELEMENTS,
) -> dict[str, Any]:
    """DeepSpeed's configuration dictionary for a model of so many elements."""
    zero: dict[str, Any] = {
        "stage": cfg.zero_stage,
        # ZeRO-3 allocates the whole bucket: no more of it than there are gradients.
        "reduce_bucket_size": min(REDUCE_BUCKET_ELEMENTS, num_elements),
    }
    if cfg.zero_stage == 3 and cfg.offload == "cpu":
        place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero["offload_param" if optim is None else "offload_optimizer"] = place
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if optim is None else float(optim.max_grad_norm),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Over micro-batches: in bfloat16 a small gradient vanishes beside a large sum.
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
