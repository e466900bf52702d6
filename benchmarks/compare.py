"""Ours and everyone else's, side by side in one process on the same tensors.

    python -m benchmarks.compare --op linear_ppo_loss --shapes gemma-2b:8192 --dtype bfloat16

For each operation and shape every provider is checked first, outputs and gradients against float64;
then those that passed are timed in turns, together with the bare matrix products (or the copy) of
the same shape. One JSON row for each provider goes to benchmarks/results/, also for those that
failed, refused or are not installed: with the reason and without a time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cases import CUT_SHORT, RESTART, describe, is_context_lost
from benchmarks.definitions import VOCABULARY_OPS
from benchmarks.measure import ContextLost, Session, dtype_name, measure_vocabulary
from benchmarks.measure_sequences import measure_sequences
from benchmarks.problems import Problem, SequenceProblem, normal_problem, sequence_problem
from benchmarks.products import MODES, modes_of
from benchmarks.providers import providers_named
from benchmarks.providers.ours import Ours
from benchmarks.providers.sequences import SEQUENCE_OPS
from benchmarks.resuming import Progress, call_of
from benchmarks.rows import environment, results_file
from benchmarks.shapes import SequenceShape, Shape, parse_sequence_shapes, parse_shapes

# Starts the last line of a run that a provider's kernel ended; its name follows.
CONTEXT_LOST = "the CUDA context was lost by "
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
IMPLS = ("triton", "cpp", "reference")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One operation on one problem."""

    op: str
    shape: Shape | SequenceShape
    ignored: float = 0.0
    modes: tuple[str, ...] = MODES


def run_cases(
    session: Session, cases: Sequence[Case], model: str | None, data: str | None
) -> list[str]:
    """Measure one case after the other; returns those that the budget left no time for."""
    dropped: list[str] = []
    problem: Problem | SequenceProblem | None = None
    made_for: tuple[object, ...] = ()
    for case in cases:
        label = f"{case.op} {case.shape.name} ignored {case.ignored:g}"
        reason = _left_out(session, case)
        if reason:
            print(f"{label}: {reason}", flush=True)
            continue
        if session.time_left_s() <= 0:
            dropped.append(label)
            continue
        print(f"\n{label}", flush=True)
        key = (case.shape, case.ignored)
        if made_for != key:
            problem = None
            problem = _problem(session, case, model, data)
            made_for = key
        if isinstance(problem, SequenceProblem):
            measure_sequences(session, case.op, problem)
        else:
            assert problem is not None
            modes = [mode for mode in case.modes if mode in modes_of(case.op)]
            measure_vocabulary(session, case.op, problem, case.ignored, modes)
    if dropped:
        print(f"\nno time left for {len(dropped)}: {'; '.join(dropped)}", flush=True)
    return dropped


def _left_out(session: Session, case: Case) -> str:
    """Why the case need not be measured, "" where it must; gae and token_rewards take no time."""
    if session.progress is None or isinstance(case.shape, SequenceShape):
        return ""
    names = [provider.name for provider in session.providers]
    modes = [mode for mode in case.modes if mode in modes_of(case.op)]
    call = call_of(case.op, case.shape.name, case.ignored, dtype_name(session.dtype))
    if session.progress.done(call, names, modes):
        return "its rows are there"
    return (
        "given up: two processes ended as it was timed" if session.progress.given_up(call) else ""
    )


def _problem(
    session: Session, case: Case, model: str | None, data: str | None
) -> Problem | SequenceProblem:
    if isinstance(case.shape, SequenceShape):
        return sequence_problem(case.shape, session.device)
    if model is None:
        return normal_problem(case.shape, session.dtype, session.device, case.ignored)
    from benchmarks.hidden_states import model_problem

    return model_problem(
        model, data, case.shape.num_rows, session.dtype, session.device, case.ignored
    )


def make_cases(options: argparse.Namespace) -> list[Case]:
    """Vocabulary operations first, shape by shape, so that the tensors are made once.

    ValueError for an operation without a shape.
    """
    vocabulary = [op for op in options.op if op in VOCABULARY_OPS]
    sequences = [op for op in options.op if op in SEQUENCE_OPS]
    modes = MODES if options.mode == "both" else (options.mode,)
    if options.model is not None:
        from benchmarks.hidden_states import model_shape

        shapes = [model_shape(options.model, rows) for rows in options.rows]
    else:
        shapes = parse_shapes(options.shapes)
    cases = [
        Case(op, shape, ignored, modes)
        for shape in shapes
        for ignored in options.ignored
        for op in vocabulary
    ]
    lengths = parse_sequence_shapes(options.sequences)
    cases += [Case(op, shape) for shape in lengths for op in sequences]
    return cases


def parse_bytes(text: str) -> int:
    """`64M` or `4G` (powers of 1024), or a number of bytes. ValueError for anything else."""
    number, unit = (text[:-1], text[-1]) if text and text[-1] in _UNITS else (text, "")
    if not number.isdigit():
        raise ValueError(f"--workspaces {text!r} is neither a number of bytes nor one with K, M, G")
    return int(number) * _UNITS[unit]


def parser() -> argparse.ArgumentParser:
    doc = __doc__ or ""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=doc.partition("\n")[0]
    )
    add = made.add_argument
    add("--op", nargs="+", choices=(*VOCABULARY_OPS, *SEQUENCE_OPS), default=list(VOCABULARY_OPS))
    add("--shapes", nargs="+", default=["cpu"], help="cpu, models, gemma-2b:8192, 512x576x49152")
    add("--sequences", nargs="+", default=["sequences"], help="of gae and token_rewards: 8k-one")
    add("--providers", nargs="+", default=None, help="all by default; products are always there")
    add("--dtype", choices=DTYPES, default=None, help="bfloat16 on a GPU, float32 on a CPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--ignored", nargs="+", type=float, default=[0.0], help="fraction of prompt rows: 0 0.4")
    add("--mode", choices=("both", *MODES), default="both")
    add("--model", help="folder of a Hugging Face causal LM: its hidden states and head")
    add("--data", help="text whose hidden states --model makes; README.md by default")
    add("--rows", nargs="+", type=int, default=[2048], help="rows N with --model")
    add("--seconds", type=float, default=20.0, help="of timing for one operation and mode")
    add("--rounds", nargs=2, type=int, default=[5, 100], help="least and most")
    add("--budget", type=float, default=float("inf"), help="seconds for everything")
    add("--resume", action="store_true", help="leave out calls whose rows are in --out already")
    add("--workspaces", nargs="+", default=[], help="a provider of ours for each bound: 0 64M 1G")
    add("--impl", choices=IMPLS, default="triton", help="the backend of --workspaces")
    add("--out", type=Path, default=None, help="file of rows, benchmarks/results/ by default")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: torch sees no GPU here")
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    try:
        cases = make_cases(options)
        providers = providers_named(options.providers)
        bounds = [parse_bytes(text) for text in options.workspaces]
        providers += [Ours(options.impl, bound) for bound in bounds]
    except ValueError as error:
        made.error(str(error))
    common = environment(device)
    out: Path = options.out or results_file(common["device"], common["date"])
    session = Session(
        device=device,
        dtype=DTYPES[dtype],
        providers=providers,
        named=options.providers,
        environment=common,
        out=out,
        seconds=options.seconds,
        rounds=(options.rounds[0], options.rounds[1]),
        deadline=time.monotonic() + options.budget,
        progress=Progress(out, common) if options.resume else None,
    )
    print(f"{common['device']}, torch {common['torch']}, {dtype}; rows go to {session.out}")
    try:
        dropped = run_cases(session, cases, options.model, options.data)
    except ContextLost as lost:
        print(f"{lost.args[1]}\n{CONTEXT_LOST}{lost.args[0]}")
        return RESTART
    except Exception as error:
        if not is_context_lost(error):
            raise
        print(f"{describe(error)}\n{CONTEXT_LOST}one of those that were timed")
        return RESTART
    return CUT_SHORT if dropped and options.resume else 0


if __name__ == "__main__":
    raise SystemExit(main())
