"""Runs one stage under torchrun, on DeepSpeed, going on where a checkpoint is.

Usage: torchrun --nproc-per-node 2 resume_worker.py STAGE ROOT OUT ZERO PRECISION [STOP_AFTER]
       torchrun --nproc-per-node 2 resume_worker.py variants ROOT OUT
ZERO is a stage, or torch. variants: many engines in turn, each whole and interrupted.

Nothing stays gathered between forwards (stage3_param_persistence_threshold 0): the parameters of
tiny models would all lie under DeepSpeed's default. STOP_AFTER: end, as if killed, after that step;
"resave": load, write what was loaded as the same checkpoint, end.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer" / "checkpoint"))
from runs_tiny import config, interrupted, run

from s2srm import distributed
from s2srm.checkpoint.saver import Checkpoints
from s2srm.checkpoint.start import Start
from s2srm.config import EngineConfig
from s2srm.engine import deepspeed_engine

VARIANTS = {
    "zero-0": ("sft", EngineConfig("deepspeed", 0), "float32"),
    "zero-1": ("scalar-rm", EngineConfig("deepspeed", 1), "float32"),
    "zero-2": ("sft", EngineConfig("deepspeed", 2), "float32"),
    "zero-3": ("scalar-rm", EngineConfig("deepspeed", 3), "float32"),
    "zero-3-offload": ("sft", EngineConfig("deepspeed", 3, "cpu"), "float32"),
    "zero-0-bfloat16": ("sft", EngineConfig("deepspeed", 0), "bfloat16"),
    "zero-1-bfloat16": ("sft", EngineConfig("deepspeed", 1), "bfloat16"),
    "zero-2-bfloat16": ("sft", EngineConfig("deepspeed", 2), "bfloat16"),
    "zero-3-bfloat16": ("sft", EngineConfig("deepspeed", 3), "bfloat16"),
}


def gather_again_every_time() -> None:
    """What DeepSpeed keeps whole by default is sharded like the rest."""
    make = deepspeed_engine.deepspeed_config

    def without_persistence(*args: Any) -> dict[str, Any]:
        found = make(*args)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    deepspeed_engine.deepspeed_config = without_persistence


def stop_after(last: int) -> None:
    """All ranks end at once, with the checkpoint of that step written."""
    after_step = Checkpoints.after_step

    def and_end(self: Checkpoints, step: int, check: Callable[[], None] | None = None) -> None:
        after_step(self, step, check)
        if step == last:
            distributed.barrier()
            os._exit(0)

    Checkpoints.after_step = and_end


def resave() -> None:
    """Write again what was read."""
    resume = Checkpoints.resume

    def and_end(self: Checkpoints, start: Start) -> int:
        self.save(resume(self, start))
        distributed.barrier()
        os._exit(0)

    Checkpoints.resume = and_end


def main(stage: str, root: str, out: str, zero: str, precision: str, last: str = "") -> None:
    torch.set_num_threads(1)
    gather_again_every_time()
    if last == "resave":
        resave()
    elif last:
        stop_after(int(last))
    zero_stage: Any = 3 if zero == "torch" else int(zero)
    engine = EngineConfig("torch" if zero == "torch" else "deepspeed", zero_stage)
    cfg = config(stage, Path(root), Path(out), engine=engine, precision=precision, resume="auto")
    run(stage, cfg)


def variants(root: Path, out: Path) -> None:
    """OUT/VARIANT-whole and OUT/VARIANT-cut, interrupted after two steps."""
    torch.set_num_threads(1)
    distributed.start()
    for name, (stage, engine, precision) in VARIANTS.items():
        shared: dict[str, Any] = {"engine": engine, "precision": precision, "eval_data": None}
        run(stage, config(stage, root, out / f"{name}-whole", **shared))
        cut = config(stage, root, out / f"{name}-cut", resume="auto", **shared)
        interrupted(stage, cut, after=2)
        run(stage, cut)
    distributed.barrier()


if __name__ == "__main__":
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if sys.argv[1] == "variants":
        variants(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(*sys.argv[1:])
