"""What a process of a stage takes before its first tensor, measured by starting one.

    python -m s2srm.plan.baseline MODULE MODEL_TYPE deepspeed|torch

imports the stage's module and what it imports on its way (transformers, the model's module, the
tokenizers, the readers of data, DeepSpeed), builds an engine around a toy, which is checked and
writes two tokens, and prints its resident bytes. Left out: the data's own rows.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any


def library_bytes(module: str, model_type: str, deepspeed: bool) -> int:
    """Resident bytes of such a process on this machine, with this process's environment."""
    engine = "deepspeed" if deepspeed else "torch"
    command = [sys.executable, "-m", __spec__.name, module, model_type, engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return int(done.stdout.splitlines()[-1])


def _load(module: str, model_type: str, engine: str) -> None:
    importlib.import_module(module)
    import datasets  # noqa: F401
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: F401
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from s2srm.config import EngineConfig, OptimConfig
    from s2srm.engine.build import build_engine
    from s2srm.models.attention import SDPA
    from s2srm.models.causal import PackedCausalLM

    assert MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]] is not None
    if engine == "deepspeed":
        from s2srm.distributed import start_alone
        from s2srm.engine.deepspeed_engine import import_deepspeed

        import_deepspeed()
        start_alone()
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    }
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    toy: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    toy.set_attn_implementation(SDPA)
    build_engine(lambda zero: PackedCausalLM(toy), EngineConfig(kind="torch"), OptimConfig())
    toy.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2, pad_token_id=0)


def _resident() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    _load(*sys.argv[1:])
    print(_resident())
