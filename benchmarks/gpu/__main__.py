"""Everything that a machine with a GPU is for, in one command: `make gpu`.

    PYTHONPATH=kernels:. python3 -m benchmarks.gpu --only trainer --out DIR

Two parts, each with a time budget of its own that it keeps by dropping what matters least:
`kernels` (build, tests, compute-sanitizer, comparison: kernels.py) and `trainer` (attention, every
stage on both engines, a PPO phase of Gemma-2B's shape, real preference data: trainer.py). Ends with
a short table. Works from a bare checkout. Exit status: 2 without a GPU, 1 if the build, a test, the
sanitizer or a stage of the trainer failed, else 0; a missed limit of the comparison is a row of the
table.

--dry-run goes through the same stages on a CPU with tiny shapes, without building anything.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import kernels, trainer
from benchmarks.gpu.runner import Runner, Stage, table
from benchmarks.rows import RESULTS, ROOT, environment


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0]
    )
    made.add_argument(
        "--only",
        nargs="+",
        default=["kernels", "trainer"],
        choices=["kernels", "trainer", *trainer.PARTS],
        metavar="PART",
        help=f"kernels, trainer, or some of the trainer's {', '.join(trainer.PARTS)}",
    )
    made.add_argument(
        "--out",
        type=Path,
        help="folder of rows, logs and curves; by default rows go to benchmarks/results and the "
        "rest to runs/gpu",
    )
    made.add_argument("--budget", type=float, help="seconds for each part")
    made.add_argument("--model", type=Path, help="a small real model for the trainer's stages")
    made.add_argument("--data", type=Path, help="a folder of preference triples for them")
    made.add_argument("--dry-run", action="store_true", help="the same stages on a CPU, tiny")
    return made.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    if not (chosen.dry_run or torch.cuda.is_available()):
        print(f"no GPU: torch {torch.__version__} sees none here (--dry-run tries it on a CPU)")
        return 2
    device = torch.device("cpu" if chosen.dry_run else "cuda")
    common = environment(device)
    folder: Path = chosen.out or (ROOT / "runs" / "gpu" if chosen.dry_run else RESULTS)
    logs: Path = (chosen.out or ROOT / "runs" / "gpu").resolve()
    print(f"{common['device']}, torch {common['torch']}, triton {common['triton']}")
    stages: list[Stage] = []
    lines: list[str] = []
    failed = False
    parts = [part for part in trainer.PARTS if {"trainer", part} & set(chosen.only)]
    if "kernels" in chosen.only:
        runner = Runner(logs, chosen.budget or kernels.BUDGET_S, chosen.dry_run)
        found, failed, lines = kernels.run_all(runner, folder, device)
        stages += found
    if parts:
        runner = Runner(logs, chosen.budget or trainer.BUDGET_S, chosen.dry_run)
        inputs = trainer.find_inputs(chosen.model, chosen.data)
        found, more = trainer.run_all(runner, folder, device, parts, inputs)
        stages += found
        lines += more
        failed = failed or any(stage.bad for stage in found)
    text = "\n".join([*table(stages), *lines])
    (logs / "summary.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
