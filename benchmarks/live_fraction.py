"""How much of a backward is left when blocks of small softmax mass are skipped.

    python -m benchmarks.live_fraction --model DIR --data FILE --skip-mass 0.001 0.01

f is the fraction of blocks (128 rows x 256 columns) that stay. With skipping a backward of unknown
coefficients costs 1 + 3f products, forward included, where the dense one costs 4 and gradients made
in forward cost 3. f is near 1 where the softmax is near uniform: measure before switching it on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.hidden_states import model_problem, model_shape
from benchmarks.problems import IGNORE_INDEX, Problem, normal_problem


@dataclass(frozen=True)
class LiveFraction:
    """skip_mass, f and the mean softmax mass that a row really loses."""

    skip_mass: float
    fraction: float
    mean_mass: float


def live_fractions(problem: Problem, skip_masses: Sequence[float]) -> list[LiveFraction]:
    """By the plan that the operators follow; every value of skip_mass must be above 0."""
    from s2srm_kernels.dispatch import engine_of
    from s2srm_kernels.lm_head.engine import ALL, SKIP_ROWS
    from s2srm_kernels.lm_head.head import Head
    from s2srm_kernels.lm_head.skipping import statistics_and_plan

    bias = None if problem.bias is None else problem.bias.detach()
    head = Head(
        *(problem.hidden.detach(), problem.weight.detach(), bias, problem.target),
        *(problem.softcap, problem.temperature, IGNORE_INDEX, None),
    )
    num_blocks = -(-problem.num_live // SKIP_ROWS)
    found: list[LiveFraction] = []
    for skip_mass in skip_masses:
        _, live, skipped = statistics_and_plan(engine_of("reference"), head, skip_mass, ALL)
        fraction = live[:num_blocks].float().mean().item()
        found.append(LiveFraction(skip_mass, fraction, skipped.mean().item()))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.live_fraction",
        description=(__doc__ or "").partition("\n")[0],
    )
    add = made.add_argument
    add("--model", required=True, help="folder of a Hugging Face causal LM")
    add("--data", help="text or .jsonl; README.md by default")
    add("--rows", type=int, default=4096)
    add("--skip-mass", nargs="+", type=float, default=[1e-4, 1e-3, 1e-2, 1e-1])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = made.parse_args(arguments)
    if not all(0 < mass <= 1 for mass in options.skip_mass):
        made.error(f"--skip-mass must be above 0 and at most 1, got {options.skip_mass}")
    device = torch.device(options.device)
    try:
        shape = model_shape(options.model, options.rows)
        problem = model_problem(
            *(options.model, options.data, options.rows, torch.float32, device), ignored=0.0
        )
    except ValueError as error:
        made.error(str(error))
    print("| inputs | skip_mass | live fraction f | products 1 + 3f | mean mass skipped |")
    print("| --- | --- | --- | --- | --- |")
    for kind in (problem, normal_problem(shape, torch.float32, device)):
        for row in live_fractions(kind, options.skip_mass):
            print(
                f"| {kind.kind} | {row.skip_mass:g} | {row.fraction:.3f} "
                f"| {1 + 3 * row.fraction:.2f} | {row.mean_mass:.2g} |"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
