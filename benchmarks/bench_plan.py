"""What `s2srm plan` says of memory beside what runs really take: predicted, measured, ratio.

    python -m benchmarks.bench_plan --data TRIPLES.jsonl --models TINY [SMOLLM2] [--only rm]

Every case is planned, then run in fresh processes, whose peaks are read when they end: the largest
resident set of a rank on a CPU, torch.cuda.max_memory_allocated on a GPU. Cases are rm and ppo on
one and two ranks, fewer tokens at a time, and the first model with two larger vocabularies.

Left out: bfloat16 on a CPU, where it takes minutes; what a GPU's context takes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

VOCABULARIES = (49152, 262144)
_MARK = "peaks-of"


@dataclass(frozen=True)
class Case:
    """A run: its stage, ranks and settings."""

    name: str
    stage: str
    ranks: int
    settings: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description="s2srm plan beside real runs")
    parser.add_argument("--data", required=True, help="triples: prompt, chosen, rejected")
    parser.add_argument("--models", nargs="+", required=True, help="model folders, smallest first")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    print(f"{date.today()}  {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print(f"{'case':<44}{'predicted MiB':>15}{'measured MiB':>15}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases(options.models, options.data, Path(scratch)):
            is_needed = case.stage == "rm" and case.ranks == 1
            if options.only not in case.name and not is_needed:
                continue
            predicted, measured = predict(case), measure(case)
            print(
                f"{case.name:<44}{predicted / 2**20:>15.0f}{measured / 2**20:>15.0f}"
                f"{predicted / measured:>8.3f}",
                flush=True,
            )


def cases(models: Sequence[str], data: str, scratch: Path) -> Iterator[Case]:
    """Reward models first: PPO takes them from where they were written."""
    for number, model in enumerate(models):
        is_tiny = number == 0
        limit, rows, tokens, new = (160, 64, 8192, 100) if is_tiny else (64, 16, 1024, 16)
        name = Path(model).name
        common = (
            *("--template.kind=plain", "--template.separator= => ", "--overwrite=true"),
            *(f"--data.path={data}", "--data.on_long_row=skip"),
            *(f"--data.max_prompt_tokens={limit}", f"--data.max_response_tokens={limit}"),
        )
        for ranks in (1, 2):
            for budget in (tokens, tokens // 2) if ranks == 1 else (tokens,):
                settings = (
                    *common,
                    *(f"--model.path={model}", f"--batch_size={rows}", "--max_steps=3"),
                    f"--microbatch_tokens={budget}",
                    f"--output={scratch / name / 'rm'}",
                )
                label = f"{name} rm, {ranks} rank(s), {budget} tokens"
                yield Case(label, "rm", ranks, settings)
        for ranks in (1, 2):
            settings = (
                *common,
                *(f"--policy.path={model}", f"--reward.model.path={scratch / name / 'rm'}"),
                *(f"--sampling.max_new_tokens={new}", f"--sampling.batch_size={rows}"),
                *(f"--rollout_size={2 * rows}", f"--minibatch_size={rows}"),
                *(f"--microbatch_tokens={tokens}", "--total_steps=2", "--ppo_epochs=1"),
                *("--reward.calibration_prompts=16", f"--output={scratch / name / 'ppo'}"),
            )
            yield Case(f"{name} ppo, {ranks} rank(s), {tokens} tokens", "ppo", ranks, settings)
        if is_tiny:
            yield from _vocabularies(Path(model), common, scratch)


def _vocabularies(model: Path, common: tuple[str, ...], scratch: Path) -> Iterator[Case]:
    """The first model with random weights and rows that no token uses."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for size in VOCABULARIES:
        folder = scratch / f"vocabulary-{size}"
        shutil.copytree(model, folder)
        (folder / "model.safetensors").unlink()
        config = AutoConfig.from_pretrained(folder)
        config.vocab_size = size
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        settings = (
            *common,
            *(f"--model.path={folder}", "--batch_size=64", "--max_steps=3"),
            *("--microbatch_tokens=4096", f"--output={scratch / f'rm-{size}'}"),
        )
        yield Case(f"vocabulary {size} rm, 1 rank(s), 4096 tokens", "rm", 1, settings)


def predict(case: Case) -> float:
    """Bytes of the rank that takes most, as `s2srm plan` has it."""
    device = _device()
    command = [sys.executable, "-m", "s2srm", "plan", f"--stage={case.stage}", "--json"]
    command += [f"--device={device}", f"--gpus={case.ranks}", *case.settings]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200)
    plan = json.loads(done.stdout)
    if device == "cpu":
        return plan["peak_bytes"]
    # max_memory_allocated knows neither context nor what the allocator keeps back.
    return max(
        phase["total_bytes"] - phase["bytes"].get("libraries", 0) for phase in plan["phases"]
    )


def measure(case: Case) -> float:
    """The same of a run."""
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable, __file__] if case.ranks == 1 else _torchrun(case.ranks)
        command = [*start, _MARK, folder, case.stage, *case.settings]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
        if done.returncode != 0:
            sys.exit(f"{case.name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        return max(float(file.read_text()) for file in Path(folder).iterdir())


def _torchrun(ranks: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    return [*launcher, __file__]


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    return next((known for known in ("h200", "a100") if known in name), "h100")


def _rank_main(folder: str, arguments: list[str]) -> int:
    """A run of s2srm that leaves its peak in a file of its own."""
    from s2srm.cli import main as run

    code = run(arguments)
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    (Path(folder) / os.environ.get("RANK", "0")).write_text(str(peak), encoding="ascii")
    return code


if __name__ == "__main__":
    if sys.argv[1:2] == [_MARK]:
        from s2srm.process import run_and_exit

        run_and_exit(lambda: _rank_main(sys.argv[2], sys.argv[3:]))
    main()
