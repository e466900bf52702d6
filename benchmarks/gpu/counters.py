"""Hardware counters of three kernels, read by Nsight Compute (ncu), one case each.

A kernel is profiled in a call of its own operation at a model's shape, with the clocks left alone.
A machine where ncu is missing, or may not read the counters, is a case that was not run, with what
ncu said. --call is the program that ncu watches.
"""

from __future__ import annotations

import csv
import functools
import io
import shutil
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.cases import Case, Figures, NotRun, cases_of, parser
from benchmarks.measure import outputs_and_gradients
from benchmarks.problems import normal_problem
from benchmarks.products import BOTH, modes_of
from benchmarks.providers.ours import Ours
from benchmarks.shapes import parse_shapes

# What the kernel is called in Triton's source, and the operation whose call launches it.
KERNELS = (
    ("statistics_kernel", "linear_token_stats"),
    ("statistics_kernel", "linear_cross_entropy"),
    ("logit_gradients_kernel", "linear_logprobs"),
)
SECTIONS = (
    "SpeedOfLight",
    "Occupancy",
    "WarpStateStats",
    "MemoryWorkloadAnalysis",
    "InstructionStats",
)
_LIMIT_S = 30.0


def counters(kernel: str, op: str, shape: str) -> Figures:
    """`section: metric [unit]` -> value, as ncu's details page has them."""
    tool = shutil.which("ncu")
    if tool is None:
        raise NotRun("ncu is not installed")
    sections = [word for section in SECTIONS for word in ("--section", section)]
    command = [
        *(tool, "--clock-control", "none", "--kernel-name", f"regex:^{kernel}"),
        *("--launch-count", "1", *sections, "--page", "details", "--csv"),
        *(sys.executable, "-m", "benchmarks.gpu.counters", "--call", op, shape),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    found = read(done.stdout)
    if not found:
        raise NotRun(_what_it_said(done))
    return found


def read(text: str) -> Figures:
    """The figures of ncu's CSV, which stands behind what the watched program printed."""
    start = text.find('"ID"')
    if start < 0:
        return {}
    found: Figures = {}
    for row in csv.DictReader(io.StringIO(text[start:])):
        if row.get("Metric Name"):
            unit = f" [{row['Metric Unit']}]" if row["Metric Unit"] else ""
            found[f"{row['Section Name']}: {row['Metric Name']}{unit}"] = row["Metric Value"]
    return found


def _what_it_said(done: subprocess.CompletedProcess[str]) -> str:
    """ncu's own complaint, or that no kernel of the name was launched."""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("==ERROR==")]
    last = own[0] if own else lines[-1] if lines else "nothing"
    return f"ncu read no counters, exit status {done.returncode}: {last[:200]}"


def call(op: str, shape: str) -> None:
    """One call of the operation, forward and backward."""
    device = torch.device("cuda")
    (one,) = parse_shapes([shape])
    problem = normal_problem(one, torch.bfloat16, device)
    outputs_and_gradients(Ours("triton").build(op, problem), problem, BOTH in modes_of(op))
    torch.cuda.synchronize(device)


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["--call"]:
        call(*words[1:])
        return 0
    made = parser(__doc__)
    made.add_argument("--shape", default="gemma-2b:8192")
    options = made.parse_args(words)
    cases: list[Case] = [
        (
            f"{kernel} of {op} {options.shape}",
            functools.partial(counters, kernel, op, options.shape),
        )
        for kernel, op in KERNELS
    ]
    return cases_of(options).run_all(cases)


if __name__ == "__main__":
    raise SystemExit(main())
