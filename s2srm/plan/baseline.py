"""What a process of a stage takes before its first tensor, measured by starting one.

    python -m s2srm.plan.baseline MODULE MODEL_TYPE deepspeed|torch

imports the stage's module and what it imports on its way (transformers, the model's module, the tokenizers, the
readers of data, DeepSpeed), makes one product, and prints its resident bytes. Left out: the data's
own rows, and buffers that grow with use.
"""

from __future__ import annotations

import importlib
import subprocess
import sys


def library_bytes(module: str, model_type: str, deepspeed: bool) -> int:
    """Resident bytes of such a process on this machine, with this process's environment."""
    engine = "deepspeed" if deepspeed else "torch"
    command = [sys.executable, "-m", __spec__.name, module, model_type, engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return int(done.stdout.splitlines()[-1])


def _load(module: str, model_type: str, engine: str) -> None:
    importlib.import_module(module)
    import datasets  # noqa: F401
    import tokenizers  # noqa: F401
    import torch
    from transformers import AutoTokenizer, DynamicCache  # noqa: F401
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    assert MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]] is not None
    from s2srm_kernels import linear_cross_entropy

    if engine == "deepspeed":
        from s2srm.distributed import start_alone
        from s2srm.engine.deepspeed_engine import import_deepspeed

        import_deepspeed()
        start_alone()
    hidden = torch.randn(8, 16, requires_grad=True)
    weight = torch.randn(32, 16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.arange(8)).backward()
    torch.optim.AdamW([weight], fused=True).step()


def _resident() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    _load(*sys.argv[1:])
    print(_resident())
