"""Tiny runs of every stage, and what is compared of two of them."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "ppo"))
from ppo_tiny import SEPARATOR, WORDS, lm, ppo_config, prompts_file, save_folder

from s2srm.checkpoint import files
from s2srm.checkpoint.saver import Checkpoints
from s2srm.config import (
    CriticConfig,
    DataConfig,
    EngineConfig,
    KLConfig,
    ModelConfig,
    OptimConfig,
    RMConfig,
    ScalarRMConfig,
    SFTConfig,
    StageConfig,
    TemplateConfig,
)
from s2srm.ppo import train as ppo
from s2srm.runs import RunResult
from s2srm.supervised import rm, scalar_rm, sft

STAGES = {"sft": sft, "rm": rm, "scalar-rm": scalar_rm, "ppo": ppo}
ADAMW = OptimConfig("adamw", lr=1e-2, weight_decay=0.01, schedule="cosine", warmup_steps=1)


def make_inputs(root: Path) -> Path:
    """policy/, rm/, prompts.jsonl and rows.jsonl of all the runs here."""
    save_folder(lm("llama", seed=0, scale=4.0), root / "policy")
    save_folder(lm("llama", seed=1), root / "rm")
    prompts_file(root / "prompts.jsonl")
    rows = [
        {
            "prompt": " ".join(WORDS[4 + (i * 7 + j) % 20] for j in range(1 + i % 4)),
            "chosen": " ".join(WORDS[4 + (i * 3 + j) % 20] for j in range(1 + i % 3)),
            "rejected": " ".join(WORDS[5 + (i * 3 + 2 * j) % 20] for j in range(1 + i % 5)),
        }
        for i in range(10)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def config(stage: str, root: Path, output: Path, **changes: Any) -> StageConfig:
    """Five steps (PPO: three phases) with a checkpoint after every one."""
    precision = changes.pop("precision", "float32")
    values: dict[str, Any] = {"output": str(output), "save_every": 1, **changes}
    policy = ModelConfig(str(root / "policy"), precision=precision)
    if stage == "ppo":
        defaults: dict[str, Any] = {
            "policy": policy,
            "optim": ADAMW,
            "critic": CriticConfig(optim=ADAMW),
            "kl": KLConfig(0.2, "adaptive", target=0.01, horizon=20),
            "total_steps": 3,
            "samples_every": 2,
            "critic_warmup_steps": 1,
        }
        return ppo_config(root, **{**defaults, **values})
    shared: dict[str, Any] = {
        "model": policy,
        "template": TemplateConfig("plain", SEPARATOR),
        "data": DataConfig(str(root / "rows.jsonl")),
        "eval_data": DataConfig(str(root / "rows.jsonl"), limit=3),
        "engine": EngineConfig(),
        "optim": ADAMW,
        "batch_size": 4,
        "max_steps": 5,
        "eval_every": 2,
    }
    kinds: dict[str, type[StageConfig]] = {
        "sft": SFTConfig,
        "rm": RMConfig,
        "scalar-rm": ScalarRMConfig,
    }
    if stage == "rm":
        shared["probe_rows"] = 2
    return kinds[stage](**{**shared, **values})


def run(stage: str, cfg: StageConfig) -> RunResult:
    """From generators in a known state: nothing else seeds Python's and numpy's."""
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    return STAGES[stage].run(cfg)


def rows_without_times(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = run / name
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith("time")} for row in rows]


def tensors(folder: Path, pattern: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        for name, tensor in load_file(path).items():
            found[f"{path.name}:{name}"] = tensor
    return found


def assert_same_run(one: Path, two: Path) -> None:
    """Model, masters, moments, metrics and samples, to the bit."""
    for folder, pattern in (
        (".", "*.safetensors"),
        ("critic", "*.safetensors"),
        (_newest(one), "*.safetensors"),
    ):
        a, b = tensors(one / folder, pattern), tensors(two / folder, pattern)
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            assert torch.equal(tensor, b[name]), name
    assert rows_without_times(one) == rows_without_times(two)
    assert rows_without_times(one, "samples.jsonl") == rows_without_times(two, "samples.jsonl")
    left, right = (json.loads((run / _newest(run) / files.STATE).read_text()) for run in (one, two))
    for key in ("step", "rng", "data", "engines"):
        assert left[key] == right[key], key
    assert _newest(one) == _newest(two)


def _newest(run: Path) -> str:
    return str(files.list_checkpoints(run)[0].relative_to(run))


class Interrupted(Exception):
    """What `interrupted` ends a run with."""


def interrupted(stage: str, cfg: StageConfig, after: int) -> None:
    """A run that ends after so many steps, its checkpoint (where one is due) just written."""
    after_step = Checkpoints.after_step

    def and_stop(self: Checkpoints, step: int, check: Callable[[], None] | None = None) -> None:
        after_step(self, step, check)
        if step == after:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Checkpoints, "after_step", and_stop)
        run(stage, cfg)
