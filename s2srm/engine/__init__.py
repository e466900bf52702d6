"""What runs a training step: plain torch in one process, or DeepSpeed ZeRO over many.

Only this package imports deepspeed, and only when a DeepSpeed engine is asked for.
"""

from s2srm.engine.base import Engine, StepInfo, map_microbatches, run_microbatches
from s2srm.engine.build import build_engine
from s2srm.engine.packed import PackedSegments

__all__ = [
    "Engine",
    "PackedSegments",
    "StepInfo",
    "build_engine",
    "map_microbatches",
    "run_microbatches",
]
