"""PPO phases of a model's shape with random weights: memory, time by phase, MFU, the plan's error.

Policy, reference, critic and seq2seq RM are all of that shape. Every response has full length in
practice: a random policy ends one with a chance of 1/V a token. The first phase compiles kernels,
the last is reported.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.rows import device_name
from benchmarks.trainer.mfu import Size, peak_of, phase_flops
from benchmarks.trainer.random_model import SHAPES, TEMPLATE, write_model, write_prompts
from benchmarks.trainer.rows import Figures, NotRun, Rows, parser
from s2srm import process
from s2srm.commands.libraries import quiet_libraries
from s2srm.config import (
    CriticConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
)
from s2srm.runs import config_to_dict

LIMIT_GIB = 78.0
"""What an 80 GB card has for a process."""
_SIZES = {"gemma-2b": (64, 256, 128), "tiny": (4, 12, 6)}
"""Responses of a phase, tokens of a prompt, tokens of a response."""


def config(shape: str, work: Path, dtype: str) -> PPOConfig:
    """The Gemma recipe's settings at this size, on one device."""
    count, prompt, response = _SIZES[shape]
    engine = typing.get_args(typing.get_type_hints(EngineConfig)["offload"])
    model = ModelConfig(
        path=str(work / "model"),
        precision=dtype,  # type: ignore[arg-type]
        gradient_checkpointing=True,
    )
    return PPOConfig(
        output=str(work / "run"),
        overwrite=True,
        engine=EngineConfig(kind="torch", offload="idle" if "idle" in engine else "none"),  # type: ignore[arg-type]
        template=TEMPLATE,
        policy=model,
        reward=RewardConfig(kind="seq2seq", model=model, scale="none"),
        critic=CriticConfig(optim=OptimConfig(lr=5e-6, schedule="constant")),
        data=DataConfig(
            path=str(work / "prompts.jsonl"),
            max_prompt_tokens=prompt + 8,
            max_response_tokens=response,
        ),
        sampling=SamplingConfig(max_new_tokens=response, batch_size=count),
        optim=OptimConfig(lr=1e-6, schedule="constant"),
        total_steps=2,
        rollout_size=count,
        minibatch_size=max(2, count // 4),
        ppo_epochs=1,
        microbatch_tokens=8192 if shape == "gemma-2b" else 64,
        samples_every=100,
    )


def run_phases(cfg: PPOConfig, shape: str, device: torch.device) -> tuple[Figures, Figures]:
    """(figures of the last phase, times of the first); models are gone with the return."""
    from s2srm.ppo import train
    from s2srm.ppo.kl import KLController
    from s2srm.ppo.sampler import Sampler
    from s2srm.ppo.setup import load_models, prepare
    from s2srm.validation import validate

    cfg = validate(cfg)
    inputs = prepare(cfg)
    models = load_models(cfg, inputs)
    sampler = Sampler(models.policy, inputs.prompts, inputs.template.eos_id, cfg)
    controller = KLController(cfg.kl)
    size = Size.of(models.policy.module.lm, SHAPES[shape])  # type: ignore[arg-type]
    found: list[dict[str, float]] = []
    for phase in range(cfg.total_steps):
        found.append(train.run_phase(phase, models, sampler, controller, inputs, cfg))
    last, first = found[-1], found[0]
    prompt = sum(map(len, inputs.prompts)) / len(inputs.prompts)
    flops = phase_flops(
        size, cfg.rollout_size, prompt, last["response/length_mean"], cfg.ppo_epochs
    )
    seconds = {part: last[f"time/{part}_s"] for part in flops}
    figures: Figures = {f"{part}_s": spent for part, spent in seconds.items()}
    figures |= {"phase_s": sum(seconds.values()), "phase_tflop": sum(flops.values()) / 1e12}
    figures |= {"tokens_per_s": last["time/tokens_per_s"], "peak_gib": peak_gib(device)}
    peak = peak_of(device_name(device))
    if peak is not None:
        figures |= {f"mfu_{part}": flops[part] / (seconds[part] * peak) for part in flops}
        figures["mfu"] = sum(flops.values()) / (figures["phase_s"] * peak)
    times = {f"{part}_s": first[f"time/{part}_s"] for part in flops}
    if figures["peak_gib"] > LIMIT_GIB:
        raise MemoryError(f"peak {figures['peak_gib']:.1f} GiB, more than {LIMIT_GIB:g}")
    return figures, times


def peak_gib(device: torch.device) -> float:
    """Most that the process held: reserved by the allocator on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def plan_error(cfg: PPOConfig, work: Path, device: torch.device, measured: Figures) -> Figures:
    """`s2srm plan` for the same settings, in a process that sees no GPU, against what was seen."""
    if importlib.util.find_spec("s2srm.commands.plan") is None:
        raise NotRun("this checkout has no planner")
    if not measured:
        raise NotRun("no phase to compare with")
    name = device_name(device)
    known = next((k for k in ("h100", "h200", "a100") if k.upper() in name), None)
    if known is None and device.type == "cuda":
        raise NotRun(f"the planner does not know {name}")
    file = work / "plan.yaml"
    file.write_text(yaml.safe_dump(config_to_dict(cfg)), encoding="utf-8")
    command = [sys.executable, "-m", "s2srm", "plan", "--stage", "ppo", "--config", str(file)]
    command += ["--device", known or "cpu", "--gpus", "1", "--json"]
    command += ["--prompt_tokens", str(_prompt_tokens(work))]
    command += ["--response_tokens", str(cfg.sampling.max_new_tokens)]
    # For a CPU the planner measures this one and imports what the stage imports.
    limit = 300 if known is None else 60
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    if done.returncode != 0:
        raise RuntimeError(f"s2srm plan: {done.stderr.strip()[-300:]}")
    plan: dict[str, Any] = json.loads(done.stdout)
    peak, seconds = plan["peak_bytes"] / 2**30, plan["step_seconds"]
    return {
        "planned_peak_gib": peak,
        "planned_phase_s": seconds,
        "peak_error": peak / measured["peak_gib"] - 1,
        "time_error": seconds / measured["phase_s"] - 1,
    }


def _prompt_tokens(work: Path) -> int:
    first = json.loads((work / "prompts.jsonl").read_text(encoding="utf-8").partition("\n")[0])
    return len(first["prompt"].split()) + 1  # the beginning of sequence


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--work", type=Path, required=True)
    made.add_argument("--shape", choices=list(_SIZES), required=True)
    given = made.parse_args()
    quiet_libraries()
    device = torch.device(given.device)
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    rows = Rows(given.rows, given.name, device)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    count, prompt, _ = _SIZES[given.shape]
    cfg = config(given.shape, given.work, dtype)
    measured: Figures = {}

    def write() -> Figures:
        write_model(given.shape, given.work / "model", getattr(torch, dtype), device)
        write_prompts(given.shape, given.work / "prompts.jsonl", 4 * count, prompt)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return {}

    def phases() -> Figures:
        figures, first = run_phases(cfg, given.shape, device)
        measured.update(figures)
        return {**figures, **{f"first_{name}": value for name, value in first.items()}}

    rows.case(f"{given.shape} written", write)
    rows.case(f"{given.shape} phase", phases)
    rows.case("plan", lambda: plan_error(cfg, given.work, device, measured))
    shutil.rmtree(given.work / "model", ignore_errors=True)
    return int(rows.failed)


if __name__ == "__main__":
    process.run_and_exit(main)
