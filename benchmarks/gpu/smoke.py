"""Every operation once against float64: the first thing that a new machine is asked.

    --shapes small          sizes that fill no tile, in every dtype, with every option
    --shapes gemma-2b:2048  a model's, in bf16: the kernels that the later stages launch, compiled
    --shapes sequences      gae and token_rewards, which csrc/build.py must have built

A process for each model compiles its kernels while the others compile theirs. 2048 rows find the
same kernels as 8192: no configuration depends on the number of rows, and both divide by 16 in rows
and in tiles of 128.

First of all comes the one call of torch that the kernels need and that few others make: a product
of 16-bit factors in float32, best added to a sum in place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

import s2srm_kernels
from benchmarks import checking
from benchmarks.cases import Case, Figures, NotRun, cases_of, parser
from benchmarks.compare import DTYPES
from benchmarks.definitions import SCALAR_OPS, VOCABULARY_OPS
from benchmarks.measure import outputs_and_gradients
from benchmarks.problems import Problem, normal_problem, sequence_problem
from benchmarks.products import BOTH, modes_of
from benchmarks.providers.ours import Ours
from benchmarks.providers.sequences import SEQUENCE_OPS, OurSequences, call
from benchmarks.shapes import SequenceShape, Shape, parse_shapes

# No multiple of any tile, and a vocabulary of several.
_SMALL = {"small": Shape("small", 300, 72, 1000), "tiny": Shape("tiny", 40, 24, 300)}


def vocabulary_case(
    op: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    impl: str,
    workspace: int | None,
) -> Figures:
    """Errors of one call over eager's, which may be at most 2."""
    provider = Ours(impl, workspace)
    problem = _problem(shape, dtype, device)
    backward = BOTH in modes_of(op)
    reason = provider.refuses(op, problem, backward)
    if reason is not None:
        raise NotRun(reason)
    outputs, gradients = outputs_and_gradients(provider.build(op, problem), problem, backward)
    truth = checking.find_truth(op, problem, tuple(outputs), backward)
    errors = checking.compare(op, problem, truth.exact, outputs, gradients)
    if not checking.within(errors, truth, dtype):
        raise AssertionError(f"errors {errors}, eager's {truth.eager_errors}")
    worst = max(errors, key=lambda name: errors[name] / (truth.eager_errors[name] or 1.0))
    return {"worst": worst, "error": errors[worst], "eager_error": truth.eager_errors[worst]}


# The model's weight and its float64 truth fit once.
@functools.lru_cache(maxsize=1)
def _problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    return normal_problem(shape, dtype, device, ignored=0.3)


def sequence_case(op: str, device: torch.device) -> Figures:
    """gae or token_rewards in C++ or CUDA C++ against the reference in float64."""
    problem = sequence_problem(SequenceShape("small", 3000, 7), device)
    provider = OurSequences("cpp")
    reason = provider.refuses(op, problem)
    if reason is not None:
        raise NotRun(reason)
    made = provider.build(op, problem)()
    exact = call(op, "reference", problem, problem.rewards.double(), problem.values.double())
    errors = [checking.relative_error(m, e) for m, e in zip(made, exact, strict=True)]
    if max(errors) > 1e-6:
        raise AssertionError(f"errors {errors}")
    return {"error": max(errors)}


def float32_sum(device: torch.device) -> Figures:
    """16-bit factors, a float32 product; added_in_place: whether torch adds it to a sum, too.

    Where it does not, the kernels go another way, which costs a pass over the sum.
    """
    if device.type != "cuda":
        raise NotRun("torch has it on a GPU alone")
    from s2srm_kernels.triton.products import adds_mixed

    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(256, 256, generator=generator, device=device).bfloat16() for _ in range(2)
    )
    made = torch.mm(left, right, out_dtype=torch.float32)
    error = checking.relative_error(made, left.double() @ right.double())
    if error > 1e-6:
        raise AssertionError(f"relative error {error}")
    return {"error": error, "added_in_place": adds_mixed(device, left.dtype)}


def sample_case(shape: Shape, dtype: torch.dtype, device: torch.device, impl: str) -> Figures:
    """Draws beside the reference's; their logprobs must have the bits of linear_logprobs."""
    problem = _problem(shape, dtype, device)
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    seeds = torch.arange(shape.num_rows, device=device)
    drawn = s2srm_kernels.linear_sample(hidden, weight, seeds, seeds % 7, impl=impl)
    right = s2srm_kernels.linear_sample(hidden, weight, seeds, seeds % 7, impl="reference")
    others = int((drawn.tokens != right.tokens).sum())
    # Two logits in other orders of summation may change places; a wrong draw is wrong everywhere.
    if others > shape.num_rows / 100:
        raise AssertionError(f"{others} of {shape.num_rows} tokens are not the reference's")
    with torch.no_grad():
        made = s2srm_kernels.linear_logprobs(hidden, weight, drawn.tokens, impl=impl)
    if not torch.equal(made.logprobs, drawn.logprobs):
        raise AssertionError("logprobs have other bits than linear_logprobs'")
    return {"other_tokens": others}


def cases(names: Sequence[str], device: torch.device, impl: str) -> Iterator[Case]:
    """Those of each name of shapes, the most telling first."""
    for text in names:
        if text == "sequences":
            for op in SEQUENCE_OPS:
                yield op, functools.partial(sequence_case, op, device)
            continue
        small = text in _SMALL
        if small:
            yield "float32 sum of 16-bit products", functools.partial(float32_sum, device)
        (shape,) = [_SMALL[text]] if small else parse_shapes([text])
        dtypes = tuple(DTYPES) if small and device.type == "cuda" else _DTYPES[device.type]
        for dtype in dtypes:
            for op in VOCABULARY_OPS:
                for workspace in (None, 0) if op in SCALAR_OPS else (None,):
                    name = Ours(impl, workspace).name
                    yield (
                        f"{op} {shape.name} {dtype} {name}",
                        functools.partial(
                            vocabulary_case, op, shape, DTYPES[dtype], device, impl, workspace
                        ),
                    )
            yield (
                f"linear_sample {shape.name} {dtype} s2srm-{impl}",
                functools.partial(sample_case, shape, DTYPES[dtype], device, impl),
            )


_DTYPES = {"cuda": ("bfloat16",), "cpu": ("float32",)}


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument(
        "--shapes", nargs="+", required=True, help="small, tiny, sequences, gemma-2b:2048"
    )
    made.add_argument("--impl", default="triton")
    options = made.parse_args(arguments)
    print(f"s2srm_kernels of {s2srm_kernels.__file__}", flush=True)
    device = torch.device(options.device)
    return cases_of(options).run_all(list(cases(options.shapes, device, options.impl)))


if __name__ == "__main__":
    raise SystemExit(main())
