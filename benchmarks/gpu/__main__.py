"""Everything that a machine with a GPU is for, in one command: `make gpu`.

    PYTHONPATH=kernels:. python3 -m benchmarks.gpu --only kernels --out DIR

Two parts with a time budget each: `kernels` (kernels.py has its stages) and `trainer` (attention,
every stage on both engines, a PPO phase of Gemma-2B's shape, real preference data: trainer.py). A
part keeps its budget by dropping what matters least, and ends with a short table. The kernels' rows
are one file, named after device, kernel sources and versions (journal.py): with it a second run
goes on where the first stopped. Works from a bare checkout. Exit status: 2 without a GPU, 1 if the
build, an operation's smoke, a test, the sanitizer or a stage of the trainer failed, else 0; a
missed limit of the comparison is a row of the table.

--dry-run goes through the same stages on a CPU with tiny shapes, without building anything.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import kernels, trainer
from benchmarks.gpu.journal import STAGE, Journal
from benchmarks.gpu.runner import Runner, Stage, table
from benchmarks.gpu.steps import Steps
from benchmarks.report import latest, write
from benchmarks.rows import RESULTS, ROOT, environment, read_cases, read_rows
from benchmarks.tables import absent, case_tables, claims

LOGS = ROOT / "runs" / "gpu"


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0]
    )
    add = made.add_argument
    parts = ["kernels", *kernels.STAGES, "trainer", *trainer.PARTS]
    add(
        *("--only",),
        nargs="+",
        default=["kernels", "trainer"],
        choices=parts,
        metavar="PART",
        help=f"kernels or some of {', '.join(kernels.STAGES)}; trainer or some of "
        f"{', '.join(trainer.PARTS)}",
    )
    add(
        "--out",
        type=Path,
        help="folder of the rows and the table, with the trainer's logs and curves; by default "
        "rows go to benchmarks/results and the rest to runs/gpu",
    )
    add("--budget", type=float, help="seconds for each part")
    add("--again", nargs="+", default=[], metavar="STEP", help="steps to run although passed; all")
    add("--model", type=Path, help="a small real model for the trainer's stages")
    add("--data", type=Path, help="a folder of preference triples for them")
    add("--dry-run", action="store_true", help="the same stages on a CPU, tiny")
    return made.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    if not (chosen.dry_run or torch.cuda.is_available()):
        print(f"no GPU: torch {torch.__version__} sees none here (--dry-run tries it on a CPU)")
        return 2
    device = torch.device("cpu" if chosen.dry_run else "cuda")
    common = environment(device)
    out: Path = (chosen.out or (LOGS / "dry" if chosen.dry_run else LOGS)).resolve()
    folder: Path = out if chosen.out or chosen.dry_run else RESULTS
    print(f"{common['device']}, torch {common['torch']}, triton {common['triton']}", flush=True)
    stages: list[Stage] = []
    lines: list[str] = []
    failed = False
    wanted = list(kernels.STAGES) if "kernels" in chosen.only else chosen.only
    if set(wanted) & set(kernels.STAGES):
        # Rows of a CPU's dry run must not be gone on with by a real one, and are elsewhere.
        logs = out / "logs" if chosen.dry_run else LOGS
        places = () if chosen.dry_run else (LOGS, RESULTS / "gpu")
        runner = Runner(logs, chosen.budget or kernels.BUDGET_S, chosen.dry_run)
        home = RESULTS / "gpu" if folder == RESULTS else folder
        journal = Journal(home, common, places, copies=logs)
        steps = Steps(runner, journal, device.type, chosen.again)
        found, failed = kernels.run_all(steps, wanted)
        stages += found
        lines += summary(journal.path)
    parts = [part for part in trainer.PARTS if {"trainer", part} & set(chosen.only)]
    if parts:
        runner = Runner(out, chosen.budget or trainer.BUDGET_S, chosen.dry_run)
        inputs = trainer.find_inputs(chosen.model, chosen.data)
        found, more = trainer.run_all(runner, folder, device, parts, inputs)
        stages += found
        lines += more
        failed = failed or any(stage.bad for stage in found)
    if chosen.out is None and not chosen.dry_run:
        write(RESULTS)
    # The stages last: a terminal, and whoever keeps the end of an output, shows these.
    text = "\n".join([*lines, *table(stages)])
    (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(failed)


def summary(path: Path) -> list[str]:
    """Lines of short tables with what the file of rows has."""
    if not path.exists():
        return []
    rows = latest(read_rows([path]))
    # How each process ended is the table above.
    cases = [row for row in read_cases([path]) if row.part != STAGE]
    return [*case_tables(cases), *absent(rows), *claims(rows)]


if __name__ == "__main__":
    raise SystemExit(main())
