"""`s2srm doctor`: what is installed, and what will run on it. It reports and never fails."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence

SUMMARY = "Versions, devices, and which backend each operation and attention will use."

_GIB = 2**30


def run(argv: Sequence[str]) -> None:
    """Print the tables."""
    argparse.ArgumentParser(prog="s2srm doctor", description=SUMMARY).parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    sections = (
        ("versions", versions()),
        ("devices", devices()),
        ("backends of the operations", backends()),
        ("operations (impl=auto)", operations()),
        ("attention (auto)", attention()),
        ("tools", tools()),
    )
    for title, rows in sections:
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column()
        for row in rows:
            table.add_row(*row)
        console.print(table)


def versions() -> Iterator[tuple[str, str]]:
    """Every package that shapes a result."""
    from s2srm import runs

    for name, version in runs.versions().items():
        yield name, version or "not installed"


def devices() -> Iterator[tuple[str, str]]:
    """CPU and every CUDA device."""
    import torch

    yield (
        "CPU",
        f"{platform.machine()}, {os.cpu_count()} cores, torch threads {torch.get_num_threads()}",
    )
    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield (
            "CUDA",
            "none: " + ("no device found" if built else "this torch is built without CUDA"),
        )
        return
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / _GIB
        capability = f"{properties.major}.{properties.minor}"
        yield f"cuda:{i}", f"{properties.name}, {memory:.0f} GiB, capability {capability}"


def backends() -> Iterator[tuple[str, str]]:
    """Compiled backends, and why one cannot be used."""
    from s2srm_kernels.dispatch import load

    for impl in ("cpp", "triton"):
        yield impl, load(impl) or "loaded"


def operations() -> Iterator[tuple[str, str]]:
    """The implementation that `impl="auto"` takes on each kind of device that is here."""
    import torch

    import s2srm_kernels
    from s2srm_kernels.dispatch import choose

    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name in sorted(s2srm_kernels.__all__):
        if name.islower():
            chosen = [f"{kind}: {choose(name, 'auto', torch.device(kind))}" for kind in kinds]
            yield name, ", ".join(chosen)


def attention() -> Iterator[tuple[str, str]]:
    """What attention: auto becomes for precisions and kinds of models; each FlashAttention."""
    import torch

    from s2srm import distributed
    from s2srm.models import flash
    from s2srm.models.choice import find_attention

    device = distributed.device()
    gemma_2 = flash.Needs(head_dim=256, softcap=True, window=True)
    for name, dtype, needs in (
        ("float32", torch.float32, flash.Needs()),
        ("bfloat16", torch.bfloat16, flash.Needs()),
        ("bfloat16, Gemma 2 (softcap)", torch.bfloat16, gemma_2),
    ):
        yield name, find_attention(device, dtype, needs).words
    for kernel in flash.KERNELS:
        if kernel is flash.TORCH:
            continue
        found = kernel.version or "not installed"
        if kernel.version is not None and device.type == "cuda":
            capability = flash.capability_of(device)
            found += f", {flash.why_not(kernel, capability, flash.Needs()) or 'can be used here'}"
        yield kernel.package, found


def tools() -> Iterator[tuple[str, str]]:
    """What training on several ranks needs."""
    gcc = shutil.which("gcc")
    yield (
        "gcc",
        _first_line([gcc, "--version"]) if gcc else "not found; DeepSpeed on a CPU needs it",
    )
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    yield (
        "ZeRO training",
        "DeepSpeed" if has_deepspeed else "not possible: pip install 's2srm[deepspeed]'",
    )


def _first_line(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return next(
        iter((result.stdout or result.stderr).splitlines()), f"exit code {result.returncode}"
    )
