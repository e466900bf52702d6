"""DeepSpeed as it is with large models: what it keeps whole of tiny ones is sharded."""

from __future__ import annotations

from typing import Any

from s2srm.engine import deepspeed_engine


def keep_whole_up_to(num_elements: int) -> None:
    """Shard every parameter of more elements, as DeepSpeed does from 100,000 on.

    0 shards all of them, so that every forward and backward gathers every parameter.
    """
    config = deepspeed_engine.deepspeed_config

    def changed(*args: Any) -> dict[str, Any]:
        result = config(*args)
        result["zero_optimization"]["stage3_param_persistence_threshold"] = num_elements
        return result

    deepspeed_engine.deepspeed_config = changed
