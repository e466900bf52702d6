"""Candidates of the kernels' configuration beside the one that ships: bits first, then time.

A candidate changes the walk over the tiles (`group`) or the depth of the copies' pipeline
(`num_stages`), and no bit of any output or gradient: one that does is reported and not timed. Other
columns of a split merge the statistics in another order: such a candidate must agree within
rounding, and says where its bits differ. A default changes by hand, with the rows beside it. Left
out: tile shapes, which change the order of summation of every logit.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Figures, cases_of, describe, is_context_lost, parser
from benchmarks.checking import relative_error
from benchmarks.definitions import VOCABULARY_OPS
from benchmarks.measure import outputs_and_gradients
from benchmarks.problems import Problem, normal_problem
from benchmarks.products import BOTH, modes_of
from benchmarks.providers.ours import Ours
from benchmarks.shapes import Shape, parse_shapes
from benchmarks.timing import time_in_turns

SHIPPED = "shipped"


@dataclass(frozen=True)
class Candidate:
    """Changes of every tile of logits, by field, and columns of a split; None: as shipped."""

    name: str
    tile: dict[str, int] = dataclasses.field(default_factory=dict)
    split_columns: int | None = None


CANDIDATES = (
    Candidate("group 4", {"group": 4}),
    Candidate("group 16", {"group": 16}),
    Candidate("group 32", {"group": 32}),
    Candidate("2 stages", {"num_stages": 2}),
    Candidate("4 stages", {"num_stages": 4}),
    Candidate("group 16, 4 stages", {"group": 16, "num_stages": 4}),
    Candidate("splits of 1024 columns", split_columns=1024),
    Candidate("splits of 4096 columns", split_columns=4096),
)


@contextmanager
def configured(candidate: Candidate) -> Iterator[None]:
    """The kernels launch with the candidate's changes inside the block."""
    from s2srm_kernels.triton import configs

    shipped: dict[str, Any] = {
        "logits_tile": configs.logits_tile,
        "split_columns": configs.split_columns,
    }

    @functools.wraps(configs.logits_tile)
    def logits_tile(*arguments: Any, **keywords: Any) -> Any:
        return dataclasses.replace(shipped["logits_tile"](*arguments, **keywords), **candidate.tile)

    @functools.wraps(configs.split_columns)
    def split_columns(*arguments: Any, **keywords: Any) -> int:
        found = candidate.split_columns
        return shipped["split_columns"](*arguments, **keywords) if found is None else found

    configs.logits_tile, configs.split_columns = logits_tile, split_columns
    try:
        yield
    finally:
        configs.logits_tile = shipped["logits_tile"]
        configs.split_columns = shipped["split_columns"]


def sweep(
    op: str,
    shape: Shape,
    device: torch.device,
    candidates: Sequence[Candidate],
    rounds: tuple[int, int],
) -> Figures:
    """By candidate: its time over the shipped one's of the same round, or why it has none.

    shipped_ms: median of the shipped configuration.
    """
    problem = _problem(shape, device)
    run = Ours("triton").build(op, problem)
    backward = BOTH in modes_of(op)

    def results() -> dict[str, Tensor]:
        outputs, gradients = outputs_and_gradients(run, problem, backward)
        return outputs | {f"d_{name}": value for name, value in gradients.items()}

    def call_of(candidate: Candidate) -> Callable[[], object]:
        def call() -> object:
            with configured(candidate):
                return outputs_and_gradients(run, problem, backward, checked=False)

        return call

    expected = results()
    figures: Figures = {}
    calls = {SHIPPED: call_of(Candidate(SHIPPED))}
    for candidate in candidates:
        # A candidate may ask for more shared memory than there is, or not compile: a finding.
        try:
            with configured(candidate):
                made = results()
        except Exception as error:
            if is_context_lost(error):
                raise
            figures[candidate.name] = describe(error)
            continue
        changed = [name for name in expected if not torch.equal(made[name], expected[name])]
        wrong = changed if candidate.split_columns is None else _far(made, expected)
        name = candidate.name if not changed else f"{candidate.name} (other bits)"
        if wrong:
            figures[name] = f"not timed: other {', '.join(wrong)}"
        else:
            calls[name] = call_of(candidate)
    del expected
    times = time_in_turns(calls, device, 2.0, rounds)
    shipped = times.pop(SHIPPED)
    for name, values in times.items():
        pairs = zip(values, shipped, strict=False)
        figures[name] = statistics.median(value / base for value, base in pairs)
    return {"shipped_ms": statistics.median(shipped), **figures}


def _far(made: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What differs by more than another order of merging."""
    errors = {name: relative_error(made[name], expected[name]) for name in expected}
    return [name for name, error in errors.items() if not error <= _MERGED]


# Gradients in bf16 turn a last digit of a float32 statistic into one of their own, here and there.
_MERGED = 1e-3


@functools.lru_cache(maxsize=1)
def _problem(shape: Shape, device: torch.device) -> Problem:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return normal_problem(shape, dtype, device)


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--shapes", nargs="+", required=True)
    made.add_argument("--ops", nargs="+", choices=VOCABULARY_OPS, default=VOCABULARY_OPS)
    made.add_argument("--candidates", nargs="+", help="by name; all of them by default")
    made.add_argument("--rounds", nargs=2, type=int, default=[3, 15], help="least and most")
    options = made.parse_args(arguments)
    device = torch.device(options.device)
    wanted = options.candidates
    candidates = [c for c in CANDIDATES if wanted is None or c.name in wanted]
    rounds = (options.rounds[0], options.rounds[1])
    cases: list[Case] = [
        (f"{op} {shape.name}", functools.partial(sweep, op, shape, device, candidates, rounds))
        for shape in parse_shapes(options.shapes)
        for op in options.ops
    ]
    return cases_of(options).run_all(cases)


if __name__ == "__main__":
    raise SystemExit(main())
